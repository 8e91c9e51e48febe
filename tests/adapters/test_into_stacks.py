"""Updates of stacked parameters in full checkpoints, however those store them, against PEFT and dense updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pimerge
from pimerge.adapters.into_stacks import PlacedMatrix, stacked_pieces
from pimerge.adapters.lora_module import Factors
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.core.errors import PimergeError
from tests.support.experts import set_config
from tests.support.mixtures import (
    EXPERTS,
    MIXTURES,
    changes,
    experts_name,
    mixture,
    save_adapter,
    save_adapter_by_layer,
    updates_by_peft,
)
from tests.support.numerics import normal


def saved(name: str, folder: Path, **edits: Any) -> Any:
    base = mixture(name)
    base.save_pretrained(folder / "base", **edits)
    return base


def pair(base: Any, name: str, folder: Path) -> dict[str, Tensor]:
    """Two adapters of the experts and their router, and 0.7 ΔW_a + 0.4 ΔW_b."""
    parameters = [f"{experts_name(name)}.{each}" for each in ("gate_up_proj", "down_proj")]
    total: dict[str, Tensor] = {}
    for seed, (letter, weight) in enumerate({"a": 0.7, "b": 0.4}.items(), 1):
        save_adapter(base, folder / letter, seed, target_modules=[], target_parameters=parameters, r=seed)
        set_config(folder / letter, base_model_name_or_path="../base")
        for key, delta in updates_by_peft(base, folder / letter).items():
            total[key] = total.get(key, 0) + weight * delta
    return total


def merge_into(folder: Path, into: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"method": "interpolated", "weights": [0.7, 0.4], "output": folder / "out"} | options
    pimerge.merge([folder / "a", folder / "b"], into=into, **settings)
    return Path(settings["output"])


def require_equal(base: Any, folder: Path, expected: Mapping[str, Tensor]) -> None:
    found = changes(base, type(base).from_pretrained(folder).state_dict())
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert (delta - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("name", MIXTURES)
def test_transformers_loads_the_sum(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path)
    expected = pair(base, name, tmp_path)
    require_equal(base, merge_into(tmp_path, tmp_path / "base"), expected)
    experts = [tmp_path / "a", tmp_path / "b"]
    checked = pimerge.verify(tmp_path / "out", experts=experts, base=tmp_path / "base", weights=[0.7, 0.4])
    assert checked.equal


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_matrix_that_is_left_out_stays_the_base_s(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path)
    expected = pair(base, name, tmp_path)
    for delta in expected.values():
        delta[1] = 0
    require_equal(base, merge_into(tmp_path, tmp_path / "base", exclude=["*.experts.1.*"]), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_stacked_on_disk_as_in_the_loaded_model(name: str, tmp_path: Path) -> None:
    """A checkpoint that was saved with the names of the loaded model."""
    base = saved(name, tmp_path, save_original_format=False)
    assert any(key.endswith("experts.down_proj") for key in load_file(tmp_path / "base" / "model.safetensors"))
    expected = pair(base, name, tmp_path)
    require_equal(base, merge_into(tmp_path, tmp_path / "base"), expected)


def test_earlier_names_into_either_checkpoint(tmp_path: Path) -> None:
    base = mixture("mixtral")
    expected = save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1)
    for number, original in enumerate((True, False)):
        folder = tmp_path / f"base{number}"
        base.save_pretrained(folder, save_original_format=original)
        set_config(tmp_path / "old", base_model_name_or_path=f"../base{number}")
        pimerge.merge([tmp_path / "old"], into=folder, output=tmp_path / f"out{number}")
        require_equal(base, tmp_path / f"out{number}", expected)


def test_a_file_without_a_config(tmp_path: Path) -> None:
    """Only the names tell, for stacked weights and for those of each layer."""
    base = saved("mixtral", tmp_path)
    expected = pair(base, "mixtral", tmp_path)
    out = merge_into(tmp_path, tmp_path / "base" / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    require_equal(base, tmp_path, expected)
    (tmp_path / "model.safetensors").unlink()
    save_file({key: tensor.contiguous() for key, tensor in base.state_dict().items()}, tmp_path / "flat.safetensors")
    flat = merge_into(tmp_path, tmp_path / "flat.safetensors", output=tmp_path / "flat")
    found = load_file(flat / "flat.safetensors")
    for key, delta in expected.items():
        torch.testing.assert_close(found[key].double() - base.state_dict()[key], delta, rtol=1e-4, atol=1e-5)


def test_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path)
    pair(base, "mixtral", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts"
    for edit, reason in (
        (
            {f"{name}.0.w2.weight": torch.zeros(8, 11)},
            r"experts.0.down_proj': ΔW is \(8, 12\).*w2.weight' is \(8, 11\)",
        ),
        (
            {f"{name}.{EXPERTS - 1}.{layer}.weight": None for layer in ("w1", "w2", "w3")},
            r"the checkpoint has 2 experts",
        ),
        ({f"{name}.0.w3.weight": None}, r"of this one's layers, '.*w1.weight' is \(12, 8\)"),
        ({f"{name}.0.w2.weight": torch.zeros(8, 12, dtype=torch.int64)}, "w2.weight' is stored as I64|quantised"),
    ):
        changed = {**tensors, **edit}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, path)
        with pytest.raises(PimergeError, match=reason):
            merge_into(tmp_path, tmp_path / "base", base=str(tmp_path / "base"))


def test_square_matrices_need_the_model_s_code(tmp_path: Path) -> None:
    """Whether they are transposed does not show in their shape."""
    base = nn.Module()
    base.inner = nn.Module()
    base.inner.square = nn.Parameter(torch.zeros(2, 4, 4))
    base.inner.other = nn.Parameter(torch.zeros(2, 4, 5))
    for name in ("square", "other"):
        save_adapter(base, tmp_path / name, 1, target_modules=[], target_parameters=[f"inner.{name}"])
    save_file(base.state_dict(), tmp_path / "s.safetensors")
    (delta,) = updates_by_peft(base, tmp_path / "other").values()
    pimerge.merge([tmp_path / "other"], into=tmp_path / "s.safetensors", output=tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "s.safetensors")["inner.other"].double(), delta)
    with pytest.raises(PimergeError, match=r"'inner.square' is \(2, 4, 4\), and only the model's code says whether"):
        pimerge.merge([tmp_path / "square"], into=tmp_path / "s.safetensors", output=tmp_path / "out2")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_in_float64_is_summed_in_float64(transposed: bool, tmp_path: Path) -> None:
    A, B, W = normal(2, 6, seed=1), normal(4, 2, seed=2), normal(3, 4, 6).double() / 3
    stored = W.mT.contiguous() if transposed else W
    save_file({"w": stored}, tmp_path / "x.safetensors")
    checkpoint, place = open_checkpoint(tmp_path / "x.safetensors"), PlacedMatrix("m", index=1)
    pieces = stacked_pieces(checkpoint, "w", [place], lambda _: Factors(A, B, 0.3), transposed=transposed)
    found = torch.cat(list(pieces)).view(stored.shape)
    W[1] += 0.3 * B.double() @ A.double()
    torch.testing.assert_close(found.mT if transposed else found, W, rtol=1e-14, atol=1e-14)
