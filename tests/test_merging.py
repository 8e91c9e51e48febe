"""Merging whole experts, against dense sums in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pimerge.errors import PimergeError
from pimerge.expert import Expert, open_expert
from pimerge.lowrank import MergedModule
from pimerge.merge_methods import interpolated, uniform
from pimerge.merging import merge
from tests.raw import PREFIX, Updates, normal, raw_expert, set_config, set_tensors, small, updates_of

F64 = torch.float64
SHAPES = {"q": (7, 2, 6), "v": (5, 3, 6)}


def product(A: Tensor, B: Tensor) -> Tensor:
    """B A in float64."""
    return B.to(F64) @ A.to(F64)


def dense(merged: Sequence[MergedModule]) -> dict[str, Tensor]:
    """Module → the merged ΔW."""
    assert all(part.factors.scaling == 1.0 for part in merged)
    return {part.module.name: product(part.factors.A, part.factors.B) for part in merged}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rel: float = 1e-10) -> None:
    """The same modules, each equal by Frobenius norm."""
    assert list(found) == sorted(expected)
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= rel * float(delta.norm()) + 1e-300, name


@pytest.fixture
def pool(tmp_path: Path) -> list[Expert]:
    """Three experts of different scaling on the same modules."""
    return [
        open_expert(raw_expert(tmp_path / f"e{i}", updates_of(SHAPES, 10 * i), lora_alpha=4.0 * i + 2))
        for i in range(3)
    ]


def scaled(i: int, name: str) -> Tensor:
    """ΔW of a module of the pool's expert i."""
    A, B = updates_of(SHAPES, 10 * i)[name]
    return (4.0 * i + 2) / len(A) * product(A, B)


@dataclass(frozen=True)
class Drawn:
    """A random expert: what is written, and its dense updates."""

    updates: Updates
    config: dict[str, Any]
    deltas: dict[str, Tensor]


@st.composite
def drawn_pools(draw: st.DrawFn) -> tuple[list[Drawn], list[float]]:
    """Experts with any ranks, alphas, scales and modules, and a weight for each."""
    shapes = draw(st.dictionaries(st.sampled_from("qkvo"), st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1))
    pool = []
    for seed in range(draw(st.integers(1, 4))):
        names = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        ranks = {name: draw(st.integers(1, 5)) for name in sorted(names)}
        size = draw(st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
        updates = {
            name: (normal(r, shapes[name][1], seed=seed), normal(shapes[name][0], r, seed=seed + 9, scale=size))
            for name, r in ranks.items()
        }
        alpha = draw(st.sampled_from([1, 8, 0.5, 1e-6, 3e4, -2]))
        special = draw(st.sampled_from(sorted(names)))
        rslora = draw(st.booleans())
        config = {"lora_alpha": alpha, "alpha_pattern": {special: 5}, "use_rslora": rslora}
        deltas = {}
        for name, (A, B) in updates.items():
            share = (5 if name == special else alpha) / (math.sqrt(len(A)) if rslora else len(A))
            deltas[name] = share * product(A, B)
        pool.append(Drawn(updates, config, deltas))
    weights = draw(st.lists(st.sampled_from([1.0, 0.25, -0.7, 0.0, 1e-6]), min_size=len(pool), max_size=len(pool)))
    return pool, weights


@settings(small, max_examples=80)
@given(drawn_pools(), st.booleans())
def test_a_merge_is_the_dense_sum_for_any_experts(
    tmp_path: Path, drawn: tuple[list[Drawn], list[float]], is_uniform: bool
) -> None:
    parts, given_weights = drawn
    experts = [open_expert(raw_expert(tmp_path / str(i), e.updates, **e.config)) for i, e in enumerate(parts)]
    method = uniform if is_uniform else interpolated
    weights = method.weights(len(parts), None if is_uniform else given_weights)
    merged = dense(merge(experts, weights, method.merge, dtype=F64))
    assert list(merged) == sorted({name for part in parts for name in part.deltas})
    for name, delta in merged.items():
        shares = [1 / len(parts)] * len(parts) if is_uniform else given_weights
        terms = [share * e.deltas[name] for share, e in zip(shares, parts, strict=True) if name in e.deltas]
        bound = 1e-9 * sum(float(term.norm()) for term in terms)
        assert float((delta - torch.stack(terms).sum(0)).norm()) <= bound


def test_one_expert_at_weight_one_comes_back_bit_by_bit(pool: list[Expert]) -> None:
    for part in merge(pool[1:2], [1.0], interpolated.merge):
        A, B = updates_of(SHAPES, 10)[part.module.name]
        assert torch.equal(part.factors.A, A)
        torch.testing.assert_close(part.factors.B, 6.0 / len(A) * B, rtol=1e-7, atol=0)
        assert (part.rank, part.lost) == (len(A), 0.0)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.3, 0.5], [2.0, -1.0], [0.0, 1.0]])
def test_copies_with_weights_of_sum_one_give_the_expert_at_its_rank(pool: list[Expert], weights: list[float]) -> None:
    merged = merge([pool[2]] * len(weights), weights, interpolated.merge, dtype=F64)
    assert_same(dense(merged), {name: scaled(2, name) for name in SHAPES})
    assert {part.module.name: part.rank for part in merged} == {"q": 2, "v": 3}


def test_a_sign_flipped_twin_has_the_same_update_and_does_not_cancel(pool: list[Expert], tmp_path: Path) -> None:
    flipped = {name: (-A, -B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    twin = open_expert(raw_expert(tmp_path / "twin", flipped, lora_alpha=2.0))
    merged = merge([pool[0], twin], uniform.weights(2, None), uniform.merge, dtype=F64)
    assert_same(dense(merged), {name: scaled(0, name) for name in SHAPES})
    assert [part.rank for part in merged] == [2, 3]


def test_an_expert_and_its_negative_cancel_to_rank_one_of_zeros(pool: list[Expert], tmp_path: Path) -> None:
    negative = {name: (A, -B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    other = open_expert(raw_expert(tmp_path / "negative", negative, lora_alpha=2.0))
    merged = merge([pool[0], other], [0.5, 0.5], interpolated.merge, dtype=F64)
    for part in merged:
        assert float(product(part.factors.A, part.factors.B).norm()) <= 1e-14


def test_the_order_of_the_experts_does_not_matter(pool: list[Expert]) -> None:
    first = merge(pool, [0.5, 0.3, 0.2], interpolated.merge, dtype=F64)
    second = merge([pool[2], pool[0], pool[1]], [0.2, 0.5, 0.3], interpolated.merge, dtype=F64)
    assert_same(dense(second), dense(first))


def test_the_basis_of_an_expert_does_not_matter(pool: list[Expert], tmp_path: Path) -> None:
    turned = {}
    for name, (A, B) in updates_of(SHAPES, 0).items():
        R = normal(len(A), len(A), seed=5).to(F64) + 2 * torch.eye(len(A), dtype=F64)
        turned[name] = (torch.linalg.inv(R) @ A.to(F64), B.to(F64) @ R)
    other = open_expert(raw_expert(tmp_path / "turned", turned, lora_alpha=2.0))
    first = merge([pool[0], pool[1]], [0.6, 0.4], interpolated.merge, dtype=F64)
    assert_same(dense(merge([other, pool[1]], [0.6, 0.4], interpolated.merge, dtype=F64)), dense(first))


def test_a_module_of_one_expert_keeps_its_weight_and_is_not_renormalised(pool: list[Expert], tmp_path: Path) -> None:
    only = open_expert(raw_expert(tmp_path / "only", updates_of({"k": (4, 1, 6)}, 7)))
    A, B = updates_of({"k": (4, 1, 6)}, 7)["k"]
    merged = merge([pool[0], only], uniform.weights(2, None), uniform.merge, dtype=F64)
    assert_same(dense(merged), {name: 0.5 * scaled(0, name) for name in SHAPES} | {"k": 0.5 * product(A, B)})


def test_an_expert_of_zeros_adds_nothing_and_alone_stays_zero(pool: list[Expert], tmp_path: Path) -> None:
    zeros = {name: (A, 0 * B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    nothing = open_expert(raw_expert(tmp_path / "zero", zeros))
    both = merge([nothing, pool[0]], [0.7, 0.3], interpolated.merge, dtype=F64)
    assert_same(dense(both), {name: 0.3 * scaled(0, name) for name in SHAPES})
    for weight in (1.0, 0.5):
        alone = merge([nothing], [weight], interpolated.merge)
        assert all(not product(part.factors.A, part.factors.B).any() and part.error == 0.0 for part in alone)


def test_each_module_can_have_weights_of_its_own(pool: list[Expert]) -> None:
    weights = {"q": [0.1, 0.2, 0.7], "v": [1.0, 0.0, -0.5]}
    merged = merge(pool, weights, interpolated.merge, dtype=F64)
    expected = {n: sum((w * scaled(i, n) for i, w in enumerate(v)), torch.zeros(())) for n, v in weights.items()}
    assert_same(dense(merged), expected)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_rank_gives_the_best_sum_of_that_rank(pool: list[Expert], rank: int) -> None:
    merged = merge(pool, [0.5, 0.3, 0.2], interpolated.merge, rank=rank, dtype=F64)
    for part in merged:
        name = part.module.name
        whole = 0.5 * scaled(0, name) + 0.3 * scaled(1, name) + 0.2 * scaled(2, name)
        left, singular, right = torch.linalg.svd(whole, full_matrices=False)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        torch.testing.assert_close(product(part.factors.A, part.factors.B), best, rtol=0, atol=1e-10)
        assert part.error == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-6, abs=1e-9)
        assert part.rank == min(rank, len(singular))


@pytest.mark.parametrize(
    ("first", "second", "expected", "precision"),
    [
        (torch.float16, torch.float16, torch.float16, 2e-3),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, 1.5e-2),
        (torch.bfloat16, torch.float16, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.float64, torch.float64, 1e-12),
    ],
)
def test_the_result_has_the_wider_dtype_and_is_rounded_once(
    first: torch.dtype, second: torch.dtype, expected: torch.dtype, precision: float, tmp_path: Path
) -> None:
    experts, whole = [], {name: torch.zeros((), dtype=F64) for name in SHAPES}
    for i, dtype in enumerate((first, second)):
        updates = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in updates_of(SHAPES, 10 * i).items()}
        experts.append(open_expert(raw_expert(tmp_path / str(i), updates)))
        whole = {name: whole[name] + 0.5 * product(*updates[name]) for name in SHAPES}
    merged = merge(experts, [0.5, 0.5], interpolated.merge)
    assert {part.factors.A.dtype for part in merged} | {part.factors.B.dtype for part in merged} == {expected}
    assert_same(dense(merged), whole, precision)


def test_a_dtype_can_be_asked_for(pool: list[Expert]) -> None:
    merged = merge(pool, [0.5, 0.3, 0.2], interpolated.merge, dtype=torch.bfloat16)
    assert {part.factors.B.dtype for part in merged} == {torch.bfloat16}


def test_a_sum_too_large_for_its_dtype_is_an_error_and_not_inf(tmp_path: Path) -> None:
    updates = {name: (A.half(), (1e3 * B).half()) for name, (A, B) in updates_of(SHAPES).items()}
    expert = open_expert(raw_expert(tmp_path / "large", updates, lora_alpha=10_000))
    with pytest.raises(PimergeError, match=r"too large for torch\.float16\n.*--dtype float32"):
        merge([expert], [1.0], interpolated.merge)
    merge([expert], [1.0], interpolated.merge, dtype=torch.float32)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "2 weights .* for 3 experts"),
        ([0.5, 0.5, math.nan], "for 3 experts"),
        ([0.5, 0.5, math.inf], "for 3 experts"),
        ({"q": [1.0, 0, 0]}, "no weights for 1 modules, such as 'v'"),
        ({"q": [1.0, 0, 0], "v": [1.0]}, "1 weights .* in 'v'"),
        (
            {"q": [1.0, 0, 0], "v": [1.0, 0, 0], "k": [1.0, 0, 0]},
            "weights for 1 modules that no expert has, such as 'k'",
        ),
    ],
)
def test_weights_that_do_not_match_are_refused(pool: list[Expert], weights: Any, message: str) -> None:
    with pytest.raises(PimergeError, match=message):
        merge(pool, weights, interpolated.merge)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(pool: list[Expert], rank: int) -> None:
    with pytest.raises(PimergeError, match=f"--rank is {rank}"):
        merge(pool, [1.0, 0, 0], interpolated.merge, rank=rank)


def test_another_base_is_refused_by_name(pool: list[Expert]) -> None:
    set_config(pool[1].path, base_model_name_or_path="org/other")
    with pytest.raises(PimergeError, match="'e1' has the base 'org/other', 'e0' has 'org/base'"):
        merge([pool[0], open_expert(pool[1].path)], [0.5, 0.5], interpolated.merge)


def test_nan_is_refused_with_expert_and_tensor(pool: list[Expert]) -> None:
    set_tensors(pool[1].path, {PREFIX + "q.lora_A.weight": torch.full((2, 6), math.nan)})
    with pytest.raises(PimergeError, match=r"'e1': .*q\.lora_A\.weight holds 12 values"):
        merge([pool[0], open_expert(pool[1].path)], [0.5, 0.5], interpolated.merge)
