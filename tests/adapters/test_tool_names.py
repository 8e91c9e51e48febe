"""Files of several tools for one model: matched where names map by a rule, refused by name where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.adapters.formats._flat_names import dotted_name, flat, kohya_name
from pimerge.core.errors import PimergeError
from tests.support.adapter_files import Tensors, deltas_in, low_rank, tensors_in, written
from tests.support.numerics import relative_difference

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.3.self_attn.q_proj"
SDXL = {  # names of diffusers' UNet of SDXL and of the original one, as in sd-scripts' library/sdxl_model_util.py
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0": (
        "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0"
    ),
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_k": "output_blocks_2_1_transformer_blocks_0_attn1_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
    "conv_out": "out_2",
}


def saved(path: Path, *parts: Tensors) -> Path:
    save_file({key: tensor for part in parts for key, tensor in part.items()}, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", SDXL)
def test_three_forms_of_a_name_in_sdxl(name: str) -> None:
    original, today = f"lora_unet_{SDXL[name]}", "lora_unet_" + name.replace(".", "_")
    assert flat(original) == flat(f"unet.{name}") == flat(today) == today
    assert kohya_name(today, ["lora_unet_middle_block_0_in_layers_2"], []) == original
    assert dotted_name(today, [], []) == f"unet.{name}"


def kohya_file(path: Path, seed: int) -> Path:
    stem = "lora_unet_" + BLOCK.replace(".", "_")
    return saved(
        path,
        low_rank(f"{stem}_to_q", 2, seed, alpha=1.0),
        low_rank(f"{stem}_to_out_0", 3, seed + 10, alpha=6.0),
        low_rank("lora_te_" + TEXT.replace(".", "_"), 2, seed + 20),
    )


def diffusers_file(path: Path, seed: int) -> Path:
    modules = (f"unet.{BLOCK}.to_q", f"unet.{BLOCK}.to_v", f"text_encoder.{TEXT}")
    return saved(path, *(low_rank(name, 2, seed + 10 * place, pair=1) for place, name in enumerate(modules)))


@pytest.mark.parametrize("order", [0, 1])
def test_files_of_kohya_and_diffusers_are_merged_in_the_format_of_the_first(order: int, tmp_path: Path) -> None:
    kohya, diffusers = kohya_file(tmp_path / "k.safetensors", 1), diffusers_file(tmp_path / "d.safetensors", 200)
    paths, weights = ([kohya, diffusers], [0.25, 0.75]) if order == 0 else ([diffusers, kohya], [0.75, 0.25])
    pimerge.merge(paths, method="interpolated", weights=weights, output=tmp_path / "m.safetensors")
    endings = {key.partition(".lora")[2] for key in tensors_in(tmp_path / "m.safetensors") if ".lora" in key}
    assert endings == ({"_down.weight", "_up.weight"} if order == 0 else {"_A.weight", "_B.weight"})
    found = {flat(name): delta for name, delta in deltas_in(tmp_path / "m.safetensors").items()}
    right: Tensors = {}
    for path, weight in ((kohya, 0.25), (diffusers, 0.75)):
        for name, delta in deltas_in(path).items():
            right[flat(name)] = right.get(flat(name), 0.0) + weight * delta
    assert found.keys() == right.keys()
    assert all(relative_difference(found[name], right[name]) < 1e-6 for name in right)
    names = list(deltas_in(tmp_path / "m.safetensors"))
    assert (f"lora_te_{TEXT.replace('.', '_')}" if order == 0 else f"text_encoder.{TEXT}") in names


def test_two_files_of_kohya_with_the_names_of_two_unets_are_one_model(tmp_path: Path) -> None:
    today = saved(
        tmp_path / "t.safetensors",
        low_rank("lora_unet_down_blocks_1_attentions_0_proj_in", 2, 1),
        low_rank("lora_unet_mid_block_attentions_0_proj_out", 2, 2),
    )
    original = saved(tmp_path / "o.safetensors", low_rank("lora_unet_input_blocks_4_1_proj_in", 2, 9, alpha=1.0))
    pimerge.merge([original, today], output=tmp_path / "m.safetensors")
    found = deltas_in(tmp_path / "m.safetensors")
    assert sorted(found) == ["lora_unet_input_blocks_4_1_proj_in", "lora_unet_middle_block_1_proj_out"]
    a, b = deltas_in(original), deltas_in(today)
    right = (a["lora_unet_input_blocks_4_1_proj_in"] + b["lora_unet_down_blocks_1_attentions_0_proj_in"]) / 2
    assert relative_difference(found["lora_unet_input_blocks_4_1_proj_in"], right) < 1e-6


def test_names_under_diffusion_model_are_flattened_by_musubi(tmp_path: Path) -> None:
    dotted = saved(tmp_path / "d.safetensors", low_rank("diffusion_model.blocks.0.self_attn.q", 2, 1, pair=1))
    flattened = saved(
        tmp_path / "f.safetensors", *(low_rank(f"lora_unet_blocks_{n}_self_attn_q", 2, 5 + n) for n in (0, 1))
    )
    pimerge.merge([dotted, flattened], output=tmp_path / "m.safetensors")
    found = deltas_in(tmp_path / "m.safetensors")
    right = deltas_in(flattened)["lora_unet_blocks_1_self_attn_q"] / 2
    assert relative_difference(found["diffusion_model.blocks.1.self_attn.q"], right) < 1e-6


def test_what_no_rule_maps_is_refused_by_name(tmp_path: Path) -> None:
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    flux = saved(tmp_path / "k.safetensors", low_rank("lora_unet_double_blocks_0_img_attn_proj", 2, 1))
    both = saved(
        tmp_path / "d.safetensors",
        low_rank("transformer.transformer_blocks.0.attn.to_out.0", 2, 2, pair=1),
        low_rank(text, 2, 3, pair=1),
    )
    for paths in ([flux, both], [both, flux]):
        with pytest.raises(PimergeError, match="no rule maps the names"):
            pimerge.merge(paths, output=tmp_path / "m.safetensors", allow_disjoint=True)
    lokr = written(tmp_path / "l.safetensors", "lycoris", 1)
    plain = saved(tmp_path / "p.safetensors", low_rank("unet.plain", 2, 3, pair=1))
    with pytest.raises(PimergeError, match=r"in the format of diffusers(.|\n)*name 'l' first"):
        pimerge.merge([plain, lokr], output=tmp_path / "m.safetensors")
    pimerge.merge([lokr, plain], output=tmp_path / "m.safetensors")


def test_files_are_ranked_across_formats(tmp_path: Path) -> None:
    target = kohya_file(tmp_path / "k.safetensors", 1)
    diffusers_file(tmp_path / "d.safetensors", 200)
    ranking = pimerge.rank(target)
    assert [candidate.name for candidate in ranking.candidates] == ["d"]
    assert open_expert(target).format == "kohya"
