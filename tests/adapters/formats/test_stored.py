"""How tools store factors: in 8 bits, with scales and scalars, in parts, for embeddings, and in one era's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.adapter_files import deltas_in, diffusers, low_rank, old_diffusers, split, tensors_in
from tests.support.numerics import normal, relative_difference


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_numbers_and_the_result_has_16(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.safetensors", low_rank("lora_unet_q", 2, n, dtype=dtype)) for n in (1, 9)]
    pimerge.merge(paths, output=tmp_path / "m.safetensors")
    found = tensors_in(tmp_path / "m.safetensors")
    assert {tensor.dtype for key, tensor in found.items() if "alpha" not in key} == {torch.bfloat16}
    right = sum(deltas_in(path)["lora_unet_q"] for path in paths) / 2
    assert relative_difference(deltas_in(tmp_path / "m.safetensors")["lora_unet_q"], right) < 5e-3


@pytest.mark.parametrize(
    "numbers",
    [
        {".scalar": 0.5},
        {".lora_down.scale_weight": 0.25, ".lora_up.weight_scale": 3.0},
        {".scalar": 2.0, ".alpha": 3.0},
    ],
)
def test_factors_of_the_update_count_once_and_are_not_written(numbers: dict[str, float], tmp_path: Path) -> None:
    tensors = low_rank("lora_unet_q", 2, 1)
    path = saved(tmp_path / "a.safetensors", tensors | {f"lora_unet_q{k}": torch.tensor(v) for k, v in numbers.items()})
    pimerge.merge(path, method="interpolated", weights=[1.0], output=tmp_path / "m.safetensors")
    factor = torch.tensor(list(numbers.values())).prod() / (2 if ".alpha" in numbers else 1)
    right = factor * tensors["lora_unet_q.lora_up.weight"] @ tensors["lora_unet_q.lora_down.weight"]
    assert relative_difference(deltas_in(tmp_path / "m.safetensors")["lora_unet_q"], right) < 1e-6
    assert sorted(tensors_in(tmp_path / "m.safetensors")) == sorted({*tensors, "lora_unet_q.alpha"})


def test_parts_of_one_module_have_the_rank_of_their_sum(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.safetensors", split(n)) for n in (1, 400)]
    pimerge.merge(paths, output=tmp_path / "m.safetensors")
    found = tensors_in(tmp_path / "m.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert [len(found[f"{stem}.lora_down.{part}.weight"]) for part in range(3)] == [4, 4, 4]
    assert f"{stem}.lora_down.weight" not in found


def test_a_part_without_its_partner_is_one_problem(tmp_path: Path) -> None:
    tensors = split(1)
    del tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.1.weight"]
    with pytest.raises(PimergeError, match=r"img_attn_qkv' has A\.0") as refused:
        open_expert(saved(tmp_path / "a.safetensors", tensors))
    assert len(refused.value.problems) == 1


def test_an_unknown_ending_is_one_problem(tmp_path: Path) -> None:
    tensors = {"lora_unet_q.alpha": torch.tensor(1.0), "lora_unet_q.lora_sideways.weight": normal(2, 2)}
    with pytest.raises(PimergeError, match="belong to no update") as refused:
        open_expert(saved(tmp_path / "a.safetensors", tensors | low_rank("lora_unet_k", 2, 1)))
    assert "only an alpha" not in str(refused.value)


def test_one_alpha_for_all_modules_of_a_part_whatever_their_ranks(tmp_path: Path) -> None:
    files = []
    for number in (1, 500):
        tensors = {}
        for place, rank in enumerate((1, 2, 3)):
            tensors |= low_rank(f"lora_unet_{place}_to_q", rank, number + 10 * place, alpha=1.0, dtype=torch.bfloat16)
        files.append(saved(tmp_path / f"{number}.safetensors", tensors))
    pimerge.merge(files, output=tmp_path / "m.safetensors")
    found = tensors_in(tmp_path / "m.safetensors")
    assert {float(tensor) for key, tensor in found.items() if key.endswith(".alpha")} == {8.0}
    deltas = [deltas_in(path) for path in [tmp_path / "m.safetensors", *files]]
    for name, delta in deltas[0].items():
        assert relative_difference(delta, (deltas[1][name] + deltas[2][name]) / 2) < 5e-3


def test_a_file_of_diffusers_has_keys_of_one_era(tmp_path: Path) -> None:
    new, old = (saved(tmp_path / f"{f.__name__}.safetensors", f(1)) for f in (diffusers, old_diffusers))
    pimerge.merge([new, old], output=tmp_path / "m.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors_in(tmp_path / "m.safetensors"))
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    found = deltas_in(tmp_path / "m.safetensors")[f"unet.{stem}.to_out.0"]
    assert relative_difference(found, deltas_in(old)[f"unet.{stem}.processor.to_out"] / 2) < 1e-6


def test_an_embedding_of_mlx_is_one_of_peft(tmp_path: Path) -> None:
    stem = "model.embed_tokens"
    tensors = {f"{stem}.lora_a": normal(11, 2), f"{stem}.lora_b": normal(2, 5, seed=3)}
    (tmp_path / "x").mkdir()
    saved(tmp_path / "x" / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 20.0}}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    pimerge.convert(tmp_path / "x", output=tmp_path / "y")
    found = tensors_in(tmp_path / "y")
    A, B = (found[f"base_model.model.{stem}.lora_embedding_{factor}"] for factor in "AB")
    assert relative_difference((B @ A).T, 20 * tensors[f"{stem}.lora_a"] @ tensors[f"{stem}.lora_b"]) < 1e-6
    pimerge.merge([tmp_path / "x", tmp_path / "y"], output=tmp_path / "m")
    assert open_expert(tmp_path / "m").modules[stem].layer == "embedding"


def test_a_file_is_converted_with_a_config_that_lies_elsewhere(tmp_path: Path) -> None:
    tensors = low_rank("base_model.model.h.0.q", 2, 1, pair=1)
    path = saved(tmp_path / "a.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"], "base_model_name_or_path": "x/y"}
    (tmp_path / "elsewhere.json").write_text(json.dumps(config))
    with pytest.raises(PimergeError, match="--config"):
        pimerge.convert(path, output=tmp_path / "no")
    right = 3 * deltas_in(path)["base_model.model.h.0.q"]
    for rank in (None, 2):
        output = tmp_path / f"rank-{rank}"
        pimerge.convert(path, rank=rank, config=tmp_path / "elsewhere.json", output=output)
        module = open_expert(output).factors("h.0.q")
        assert relative_difference(module.scaling * module.B.double() @ module.A.double(), right) < 1e-6


def mixture(folder: Path, seed: int, rank: int, *, early: bool = False) -> Path:
    """mlx-lm's LoRA of three experts of a mixture and of an attention's projection."""
    folder.mkdir()
    A, B = normal(3, rank, 5, seed=seed), normal(3, 6, rank, seed=seed + 1)
    stem, other = "model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_a": A.reshape(-1, 5) if early else A, f"{stem}.lora_b": B}
    tensors |= {f"{other}.lora_a": normal(5, rank, seed=seed + 2), f"{other}.lora_b": normal(rank, 6, seed=seed + 3)}
    saved(folder / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": rank, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_experts_of_a_mixture_in_mlx_stay_stacked(tmp_path: Path) -> None:
    paths = [mixture(tmp_path / "a", 1, 2), mixture(tmp_path / "b", 100, 1, early=True)]
    pimerge.merge(paths, output=tmp_path / "m")
    stem = "model.layers.0.mlp.switch_mlp.up_proj"

    def update(folder: Path) -> torch.Tensor:
        tensors = tensors_in(folder)
        scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        A, B = (tensors[f"{stem}.lora_{factor}"].double() for factor in "ab")
        return scale * B @ A.reshape(3, -1, 5)

    assert {key: tensor.ndim for key, tensor in tensors_in(tmp_path / "m").items()}[f"{stem}.lora_a"] == 3
    assert relative_difference(update(tmp_path / "m"), (update(paths[0]) + update(paths[1])) / 2) < 1e-6
    keys = json.loads((tmp_path / "m" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["mlp.switch_mlp.up_proj", "self_attn.q_proj"]
    with pytest.raises(PimergeError, match="stacks it with the other experts"):
        pimerge.merge(paths, exclude=["*up_proj.2"], output=tmp_path / "no")
    with pytest.raises(PimergeError, match="which PEFT names otherwise"):
        pimerge.convert(paths[0], output=tmp_path / "no")


def test_a_convolutions_kernel_does_not_decide_how_lokr_is_written(tmp_path: Path) -> None:
    tensors = {"lora_unet_q.lokr_w1": normal(2, 1), "lora_unet_q.lokr_w2": normal(3, 5, 3, 3, seed=2)}
    path = saved(tmp_path / "a.safetensors", tensors)
    pimerge.merge([path, path], rank=4, output=tmp_path / "m.safetensors")
    found = tensors_in(tmp_path / "m.safetensors")
    assert found["lora_unet_q.lokr_w2"].shape == (6, 5, 3, 3)  # LyCORIS has it whole at rank 4: 4 ≥ max(6, 5) / 2
