"""Files of other tools: scalings, metadata, names of several eras, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.adapter_files import (
    BUILDERS,
    deltas_in,
    diffusers,
    kohya,
    low_rank,
    metadata_in,
    mlx,
    old_diffusers,
    tensors_in,
    written,
)
from tests.support.numerics import normal, relative_difference


def saved(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_q.dora_scale", "DoRA rescales the base's weights"),
        ("lora_unet_q.set_weight", "replaces the base's weight"),
        ("lora_unet_q.a1.weight", "depends on the base's weights"),
        ("lora_unet_q.oft_blocks", "orthogonal matrix"),
        ("lora_unet_q.something", "belong to no update that pimerge reads: lora_unet_q.something"),
        ("emb_params", "belong to no update that pimerge reads: emb_params"),
        ("lora_unet_q.hada_w1_a", "do not make up one update"),
        ("lora_unet_q.diff", "do not make up one update"),
    ],
)
def test_what_the_file_alone_does_not_determine_is_refused(key: str, reason: str, tmp_path: Path) -> None:
    tensors = {**low_rank("lora_unet_q", 2, 1), key: normal(6, 5)}
    with pytest.raises(PimergeError, match=reason):
        open_expert(saved(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("missing", [".lora_down.weight", ".lora_up.weight"])
def test_a_factor_without_its_partner_is_refused(missing: str, tmp_path: Path) -> None:
    tensors = {**kohya(1)}
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    del tensors[stem + missing]
    with pytest.raises(PimergeError, match=f"module '{stem}' has"):
        open_expert(saved(tmp_path / "a.safetensors", tensors))


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = low_rank("lora_unet_q", 2, 1, alpha=float("nan"))
    with pytest.raises(PimergeError, match=r"lora_unet_q\.alpha is NaN"):
        open_expert(saved(tmp_path / "a.safetensors", tensors))


def test_factors_in_no_known_format_are_never_averaged(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.safetensors", {"net.lora_A": normal(2, 3, seed=n)}) for n in range(2)]
    with pytest.raises(PimergeError, match=r"net\.lora_A"):
        pimerge.merge(paths, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_checkpoint_with_factors_beside_its_weights_is_refused(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        layer = {"q.base_layer.weight": normal(3, 3), "q.lora_A.default.weight": normal(1, 3)}
        paths.append(saved(folder / "model.safetensors", layer).parent)
    with pytest.raises(PimergeError, match="holds factors of an adapter"):
        pimerge.merge(paths, base=paths[0], output=tmp_path / "out")


def test_plain_state_dicts_are_averaged_as_before_and_can_be_written_to_a_file(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.safetensors", {"w": normal(3, 3, seed=n)}) for n in range(2)]
    pimerge.merge(paths, output=tmp_path / "mean.safetensors")
    assert (tmp_path / "mean.safetensors").is_file()
    torch.testing.assert_close(
        tensors_in(tmp_path / "mean.safetensors")["w"], (normal(3, 3) + normal(3, 3, seed=1)) / 2
    )
    with pytest.raises(PimergeError, match="already exists"):
        pimerge.merge(paths, weights=[0.3, 0.7], output=tmp_path / "mean.safetensors")


def test_a_file_output_is_one_file_with_its_provenance_and_inputs_are_safe(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{n}.safetensors", "kohya", n) for n in (1, 200)]
    pimerge.merge(paths, output=tmp_path / "new" / "m.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.safetensors"]
    made = json.loads(metadata_in(tmp_path / "new" / "m.safetensors")["pimerge"])
    assert [(source["name"], source["weight"]) for source in made["sources"]] == [("1", "0.500"), ("200", "0.500")]
    with pytest.raises(PimergeError, match="is the expert"):
        pimerge.merge(paths, output=paths[0], force=True)
    with pytest.raises(PimergeError, match="named like a file, but the result needs a config"):
        pimerge.merge(written(tmp_path / "x.safetensors", "mlx", 1), output=tmp_path / "y.safetensors")


def test_kohyas_metadata_is_carried_where_shared_and_renewed(tmp_path: Path) -> None:
    shared = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "sshs_model_hash": "00", "ss_network_dim": "2"}
    first = saved(tmp_path / "a.safetensors", low_rank("lora_unet_q", 2, 1, alpha=1.0), ss_epoch="1", **shared)
    second = saved(tmp_path / "b.safetensors", low_rank("lora_unet_q", 3, 2, alpha=1.0), ss_epoch="2", **shared)
    pimerge.merge([first, second], output=tmp_path / "m.safetensors")
    found = metadata_in(tmp_path / "m.safetensors")
    assert found["ss_base_model_version"] == "sd_v1"
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora",
        "5",
        "5",
    )
    assert not found.keys() & {"sshs_model_hash", "ss_epoch"}
    assert open_expert(first).base.name == "sd_v1"
    other = saved(tmp_path / "c.safetensors", low_rank("lora_unet_q", 2, 3), ss_base_model_version="sdxl_base_v1-0")
    with pytest.raises(PimergeError, match="which is another model"):
        pimerge.merge([first, other], output=tmp_path / "no")
    unknown = saved(tmp_path / "d.safetensors", low_rank("lora_unet_q", 2, 4))
    pimerge.merge([first, unknown], output=tmp_path / "yes.safetensors")


def test_diffusers_metadata_states_the_scaling_and_is_renewed(tmp_path: Path) -> None:
    stated = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 1},
        "text_encoder.lora_alpha": 4,
        "text_encoder.use_rslora": True,
    }
    paths = [
        saved(tmp_path / f"{n}.safetensors", diffusers(n), lora_adapter_metadata=json.dumps(stated)) for n in (1, 300)
    ]
    scalings = {name.partition(".")[0]: module.scaling for name, module in open_expert(paths[0]).modules.items()}
    assert scalings["text_encoder"] == pytest.approx(4 / 2**0.5)
    modules = open_expert(paths[0]).modules
    assert modules["unet.mid_block.attentions.0.proj_in"].scaling == 0.5
    assert modules["unet.down_blocks.0.resnets.0.conv1"].scaling == 3.0
    pimerge.merge(paths, output=tmp_path / "m.safetensors")
    renewed = json.loads(metadata_in(tmp_path / "m.safetensors")["lora_adapter_metadata"])
    assert (renewed["unet.r"], renewed["unet.lora_alpha"], renewed["unet.alpha_pattern"]) == (4, 4, {})
    assert renewed["text_encoder.use_rslora"] is False
    for name, module in open_expert(tmp_path / "m.safetensors").modules.items():
        assert module.scaling == pytest.approx(1.0), name


def test_old_and_new_names_of_diffusers_are_one_module(tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    old = saved(tmp_path / "old.safetensors", old_diffusers(1))
    new = saved(tmp_path / "new.safetensors", low_rank(f"{stem}.to_out.0", 2, 9, pair=1))
    pimerge.merge([new, old], output=tmp_path / "m.safetensors")
    found = deltas_in(tmp_path / "m.safetensors")[f"{stem}.to_out.0"]
    right = (deltas_in(new)[f"{stem}.to_out.0"] + deltas_in(old)[f"{stem}.processor.to_out"]) / 2
    assert relative_difference(found, right) < 1e-6


def test_factors_of_one_part_have_one_rank_in_diffusers(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.safetensors", diffusers(n)) for n in (1, 300)]
    pimerge.merge(paths, output=tmp_path / "m.safetensors", rank="auto", energy=0.8)
    ranks: dict[str, set[int]] = {}
    for key, tensor in tensors_in(tmp_path / "m.safetensors").items():
        if key.endswith("lora_A.weight"):
            ranks.setdefault(key.partition(".")[0], set()).add(len(tensor))
    assert all(len(each) == 1 for each in ranks.values())


def test_files_whose_names_differ_are_not_merged(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{form}.safetensors", form, 1) for form in ("ai-toolkit", "mlx")]
    with pytest.raises(PimergeError, match=r"format of mlx, .* that of ai-toolkit"):
        pimerge.merge(paths, output=tmp_path / "out")


def test_kohya_and_lycoris_name_modules_alike(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.safetensors", low_rank("lora_unet_loha", 2, 1))
    second = written(tmp_path / "b.safetensors", "lycoris", 1)
    pimerge.merge([first, second], method="interpolated", weights=[1, 2], output=tmp_path / "m.safetensors")
    right = deltas_in(first)["lora_unet_loha"] + 2 * deltas_in(second)["lora_unet_loha"]
    assert relative_difference(deltas_in(tmp_path / "m.safetensors")["lora_unet_loha"], right) < 1e-6


def test_the_config_of_a_single_file_can_be_given(tmp_path: Path) -> None:
    folder = written(tmp_path / "x.safetensors", "mlx", 1)
    alone = saved(tmp_path / "alone.safetensors", mlx(1))
    with pytest.raises(PimergeError, match="pass it with --config FILE"):
        open_expert(alone)
    given = open_expert(alone, config=folder / "adapter_config.json")
    assert (given.name, given.modules) == ("alone", open_expert(folder).modules)
    pimerge.merge(alone, config=folder / "adapter_config.json", output=tmp_path / "out")
    assert (
        relative_difference(deltas_in(tmp_path / "out")["model.layers.0.self_attn.q_proj"], 20 * _product(alone)) < 1e-6
    )


def _product(path: Path) -> torch.Tensor:
    tensors = tensors_in(path)
    stem = "model.layers.0.self_attn.q_proj"
    return (tensors[f"{stem}.lora_a"] @ tensors[f"{stem}.lora_b"]).T


@pytest.mark.parametrize("form", sorted(set(BUILDERS) - {"mlx"}))
def test_the_same_bytes_in_the_same_merge(form: str, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{n}.safetensors", form, n) for n in (1, 700)]
    for name in ("x", "y"):
        pimerge.merge(paths, output=tmp_path / f"{name}.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
