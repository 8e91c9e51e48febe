"""Factors in 16-bit dtypes, against PEFT and dense products in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

import pimerge
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.rounding import rounded, side_by_side
from tests.support.experts import Updates, raw_expert, updates_of
from tests.support.numerics import normal, small

F64, BF16 = torch.float64, torch.bfloat16
SHAPES = {"q": (12, 2, 11), "v": (10, 3, 11)}


class Base(nn.Module):
    """Two layers of zeros, so that PEFT's merged weights are the updates."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_out, _, d_in) in SHAPES.items():
            layer = nn.Linear(d_in, d_out, dtype=F64)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            setattr(self, name, layer)


def by_peft(folder: Path) -> dict[str, Tensor]:
    """Module → the ΔW that PEFT computes in float64."""
    merged = PeftModel.from_pretrained(Base(), str(folder)).double().merge_and_unload()
    return {name: getattr(merged, name).weight.detach() for name in SHAPES}


def half(seed: int, dtype: torch.dtype = BF16) -> Updates:
    """Factors in a 16-bit dtype."""
    return {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in updates_of(SHAPES, seed).items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖ΔŴ − ΔW‖ / ‖ΔW‖ over all modules."""
    energy = sum(float(delta.square().sum()) for delta in expected.values())
    return math.sqrt(sum(float((found[n] - expected[n]).square().sum()) for n in expected) / energy)


def merged(folder: Path, experts: Sequence[Path], weights: Sequence[float], **options: Any) -> tuple[Path, Any]:
    """The folder and the JSON document of a merge."""
    found = pimerge.merge(experts, weights=weights, method="interpolated", output=folder, **options)
    return folder, found.to_dict()


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 5, "alpha_pattern": {"v": 7}},
        {"lora_alpha": -3.3},
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.3, -0.7])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_one_expert_keeps_its_numbers_and_the_config_its_scaling(
    tmp_path: Path, config: dict[str, Any], weight: float, dtype: torch.dtype
) -> None:
    expert = raw_expert(tmp_path / "a", half(0, dtype), **config)
    folder, document = merged(tmp_path / "out", [expert], [weight])
    expected = {name: weight * delta for name, delta in by_peft(expert).items()}
    assert difference(by_peft(folder), expected) < 1e-14
    assert document["rounding"] == 0.0
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is False


def test_integers_stay_integers_in_the_config(tmp_path: Path) -> None:
    expert = raw_expert(tmp_path / "a", half(0), lora_alpha=16, rank_pattern={"v": 3}, r=2)
    folder, _ = merged(tmp_path / "out", [expert], [1.0])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q": 2, "v": 3}, {})


@pytest.mark.parametrize(("weights", "alphas"), [([0.5, 0.5], (5, 5)), ([0.3, -0.6], (7, 7)), ([0.2, 0.1], (3, 6))])
def test_equal_scalings_and_powers_of_two_are_exact(
    tmp_path: Path, weights: list[float], alphas: tuple[int, int]
) -> None:
    experts = [raw_expert(tmp_path / str(i), half(i), lora_alpha=alpha) for i, alpha in enumerate(alphas)]
    folder, document = merged(tmp_path / "out", experts, weights)
    a, b = map(by_peft, experts)
    assert difference(by_peft(folder), {n: weights[0] * a[n] + weights[1] * b[n] for n in a}) < 1e-14
    assert document["rounding"] == 0.0


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_other_weights_tell_the_rounding_error(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    experts = [raw_expert(tmp_path / str(i), half(i, dtype), lora_alpha=5 + i) for i in range(2)]
    folder, document = merged(tmp_path / "out", experts, [0.6, 0.3], **options)
    wide, exact = merged(tmp_path / "wide", experts, [0.6, 0.3], dtype="float64", **options)
    shrink = math.sqrt(1 - exact["truncation"] ** 2)  # both errors are relative to the whole ΔW
    assert document["rounding"] == pytest.approx(shrink * difference(by_peft(folder), by_peft(wide)), rel=1e-4)
    assert 1e-5 < document["rounding"] < 5e-3
    assert exact["rounding"] == 0.0
    assert f"Rounding to {str(dtype).removeprefix('torch.')} changes ΔW" in (folder / "README.md").read_text()


def test_a_narrower_dtype_rounds_both_factors_and_says_so(tmp_path: Path) -> None:
    expert = raw_expert(tmp_path / "a", updates_of(SHAPES), lora_alpha=5)
    folder, document = merged(tmp_path / "out", [expert], [1.0], dtype="bfloat16")
    assert document["rounding"] == pytest.approx(difference(by_peft(folder), by_peft(expert)), rel=1e-3)


def test_the_weights_of_a_result_reproduce_it(tmp_path: Path) -> None:
    experts = [raw_expert(tmp_path / str(i), half(i), lora_alpha=5) for i in range(2)]
    folder, _ = merged(tmp_path / "out", experts, [0.3, 0.3])
    pimerge.merge(coefficients=folder / "coefficients.json", output=tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_biases_are_divided_by_the_scaling_that_the_config_states(tmp_path: Path) -> None:
    biases = {f"base_model.model.{n}.lora_B.bias": normal(d[0], seed=9).to(BF16) for n, d in SHAPES.items()}
    expert = raw_expert(tmp_path / "a", half(0), biases, lora_alpha=5, lora_bias=True)
    folder, _ = merged(tmp_path / "out", [expert], [1.0])
    models = [PeftModel.from_pretrained(Base(), str(each)).double() for each in (expert, folder)]
    inputs = normal(4, 11).double()
    for name in SHAPES:
        one, two = (getattr(model.base_model.model, name)(inputs) for model in models)
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


@settings(small, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1.0, 0.5, 1 / 3, -1.3, 0.0])), min_size=1, max_size=4),
    st.sampled_from([BF16, torch.float16]),
    st.integers(12, 700),
)
def test_the_measured_error_is_that_of_the_dense_product(
    parts: list[tuple[int, float]], dtype: torch.dtype, size: int
) -> None:
    factors = [
        Factors(normal(rank, 13, seed=i).to(dtype), normal(size, rank, seed=i + 9).to(dtype), 5 / 3)
        for i, (rank, _) in enumerate(parts)
    ]
    coefficients = [c for _, c in parts]
    exact = sum(
        (c * f.scaling * f.B.to(F64) @ f.A.to(F64) for f, c in zip(factors, coefficients, strict=True)),
        torch.zeros(size, 13, dtype=F64),
    )
    found = side_by_side(factors, coefficients, dtype)
    dense = found.factors.scaling * found.factors.B.to(F64) @ found.factors.A.to(F64)
    error = float((dense - exact).norm() / exact.norm()) if exact.any() else float(dense.norm())
    measured = math.sqrt(found.error / found.energy) if found.energy else 0.0
    assert measured == pytest.approx(error, rel=1e-3 if size < 512 else 0.15, abs=1e-6)


def test_float32_is_not_measured_and_has_scaling_one() -> None:
    factors = Factors(normal(2, 5), normal(6, 2), 3.0)
    found = side_by_side([factors], [0.7], torch.float32)
    assert (found.factors.scaling, found.error) == (1.0, 0.0)
    assert rounded(Factors(normal(2, 5).double(), normal(6, 2).double(), 1.0), torch.float32).error == 0.0
