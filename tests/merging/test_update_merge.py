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

import pimerge.merging.merge
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.merged_module import MergedModule
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, open_method
from pimerge.merging.methods import interpolated, uniform
from pimerge.merging.preparation import prepare
from tests.support.experts import PREFIX, Updates, dense_deltas, raw_expert, set_config, set_tensors, updates_of
from tests.support.merge_references import REFERENCES
from tests.support.merging import merge
from tests.support.numerics import normal, relative_difference, small

F64 = torch.float64
SHAPES = {"q": (7, 2, 6), "v": (5, 3, 6)}


def product(A: Tensor, B: Tensor) -> Tensor:
    """B A in float64."""
    return B.to(F64) @ A.to(F64)


def dense(merged: Sequence[MergedModule]) -> dict[str, Tensor]:
    """Module → the merged ΔW."""
    return {part.module.name: part.factors.scaling * product(part.factors.A, part.factors.B) for part in merged}


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
    merged = dense(merge(experts, weights, "uniform" if is_uniform else "interpolated", dtype=F64))
    assert list(merged) == sorted({name for part in parts for name in part.deltas})
    for name, delta in merged.items():
        shares = [1 / len(parts)] * len(parts) if is_uniform else given_weights
        terms = [share * e.deltas[name] for share, e in zip(shares, parts, strict=True) if name in e.deltas]
        bound = 1e-9 * sum(float(term.norm()) for term in terms)
        assert float((delta - torch.stack(terms).sum(0)).norm()) <= bound


def test_one_expert_at_weight_one_comes_back_bit_by_bit(pool: list[Expert]) -> None:
    for part in merge(pool[1:2], [1.0]):
        A, B = updates_of(SHAPES, 10)[part.module.name]
        assert torch.equal(part.factors.A, A)
        torch.testing.assert_close(part.factors.B, 6.0 / len(A) * B, rtol=1e-7, atol=0)
        assert (part.summary.rank, part.lost) == (len(A), 0.0)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.3, 0.5], [2.0, -1.0], [0.0, 1.0]])
def test_copies_with_weights_of_sum_one_give_the_expert_at_its_rank(pool: list[Expert], weights: list[float]) -> None:
    merged = merge([pool[2]] * len(weights), weights, dtype=F64)
    assert_same(dense(merged), {name: scaled(2, name) for name in SHAPES})
    assert {part.module.name: part.summary.rank for part in merged} == {"q": 2, "v": 3}


def test_a_sign_flipped_twin_has_the_same_update_and_does_not_cancel(pool: list[Expert], tmp_path: Path) -> None:
    flipped = {name: (-A, -B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    twin = open_expert(raw_expert(tmp_path / "twin", flipped, lora_alpha=2.0))
    merged = merge([pool[0], twin], uniform.weights(2, None), "uniform", dtype=F64)
    assert_same(dense(merged), {name: scaled(0, name) for name in SHAPES})
    least = merge([pool[0], twin], uniform.weights(2, None), "uniform", energy=1.0, dtype=F64)
    assert [part.summary.rank for part in least] == [2, 3]


def test_an_expert_and_its_negative_cancel_to_rank_one_of_zeros(pool: list[Expert], tmp_path: Path) -> None:
    negative = {name: (A, -B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    other = open_expert(raw_expert(tmp_path / "negative", negative, lora_alpha=2.0))
    merged = merge([pool[0], other], [0.5, 0.5], dtype=F64)
    for part in merged:
        assert float(product(part.factors.A, part.factors.B).norm()) <= 1e-14


def test_the_order_of_the_experts_does_not_matter(pool: list[Expert]) -> None:
    first = merge(pool, [0.5, 0.3, 0.2], dtype=F64)
    second = merge([pool[2], pool[0], pool[1]], [0.2, 0.5, 0.3], dtype=F64)
    assert_same(dense(second), dense(first))


def test_the_basis_of_an_expert_does_not_matter(pool: list[Expert], tmp_path: Path) -> None:
    turned = {}
    for name, (A, B) in updates_of(SHAPES, 0).items():
        R = normal(len(A), len(A), seed=5).to(F64) + 2 * torch.eye(len(A), dtype=F64)
        turned[name] = (torch.linalg.inv(R) @ A.to(F64), B.to(F64) @ R)
    other = open_expert(raw_expert(tmp_path / "turned", turned, lora_alpha=2.0))
    first = merge([pool[0], pool[1]], [0.6, 0.4], dtype=F64)
    assert_same(dense(merge([other, pool[1]], [0.6, 0.4], dtype=F64)), dense(first))


def test_a_module_of_one_expert_keeps_its_weight_and_is_not_renormalised(pool: list[Expert], tmp_path: Path) -> None:
    only = open_expert(raw_expert(tmp_path / "only", updates_of({"k": (4, 1, 6)}, 7)))
    A, B = updates_of({"k": (4, 1, 6)}, 7)["k"]
    merged = merge([pool[0], only], uniform.weights(2, None), "uniform", dtype=F64)
    assert_same(dense(merged), {name: 0.5 * scaled(0, name) for name in SHAPES} | {"k": 0.5 * product(A, B)})


def test_an_expert_of_zeros_adds_nothing_and_alone_stays_zero(pool: list[Expert], tmp_path: Path) -> None:
    zeros = {name: (A, 0 * B) for name, (A, B) in updates_of(SHAPES, 0).items()}
    nothing = open_expert(raw_expert(tmp_path / "zero", zeros))
    both = merge([nothing, pool[0]], [0.7, 0.3], dtype=F64)
    assert_same(dense(both), {name: 0.3 * scaled(0, name) for name in SHAPES})
    for weight in (1.0, 0.5):
        alone = merge([nothing], [weight])
        assert all(not product(part.factors.A, part.factors.B).any() and part.summary.error == 0.0 for part in alone)


def test_each_module_can_have_weights_of_its_own(pool: list[Expert]) -> None:
    weights = {"q": [0.1, 0.2, 0.7], "v": [1.0, 0.0, -0.5]}
    merged = merge(pool, weights, dtype=F64)
    expected = {n: sum((w * scaled(i, n) for i, w in enumerate(v)), torch.zeros(())) for n, v in weights.items()}
    assert_same(dense(merged), expected)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_rank_gives_the_best_sum_of_that_rank(pool: list[Expert], rank: int) -> None:
    merged = merge(pool, [0.5, 0.3, 0.2], rank=rank, dtype=F64)
    for part in merged:
        name = part.module.name
        whole = 0.5 * scaled(0, name) + 0.3 * scaled(1, name) + 0.2 * scaled(2, name)
        left, singular, right = torch.linalg.svd(whole, full_matrices=False)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        torch.testing.assert_close(product(part.factors.A, part.factors.B), best, rtol=0, atol=1e-10)
        assert part.summary.error == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-6, abs=1e-9)
        assert part.summary.rank == min(rank, len(singular))


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
    merged = merge(experts, [0.5, 0.5])
    assert {part.factors.A.dtype for part in merged} | {part.factors.B.dtype for part in merged} == {expected}
    assert_same(dense(merged), whole, precision)


def test_a_dtype_can_be_asked_for(pool: list[Expert]) -> None:
    merged = merge(pool, [0.5, 0.3, 0.2], dtype=torch.bfloat16)
    assert {part.factors.B.dtype for part in merged} == {torch.bfloat16}


def test_a_sum_too_large_for_its_dtype_is_an_error_and_not_inf(tmp_path: Path) -> None:
    updates = {name: (A.half(), (1e3 * B).half()) for name, (A, B) in updates_of(SHAPES).items()}
    expert, other = (open_expert(raw_expert(tmp_path / n, updates, lora_alpha=10_000 + len(n))) for n in ("a", "bc"))
    with pytest.raises(PimergeError, match=r"too large for torch\.float16\n.*--dtype float32"):
        merge([expert, other], [0.6, 0.3])
    merge([expert, other], [0.6, 0.3], dtype=torch.float32)


def test_a_scaling_in_the_config_keeps_large_updates_in_their_dtype(tmp_path: Path) -> None:
    updates = {name: (A.half(), (1e3 * B).half()) for name, (A, B) in updates_of(SHAPES).items()}
    expert = open_expert(raw_expert(tmp_path / "large", updates, lora_alpha=10_000))
    assert_same(dense(merge([expert], [1.0])), {n: 10_000 / len(A) * product(A, B) for n, (A, B) in updates.items()})


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
        merge(pool, weights)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(pool: list[Expert], rank: int) -> None:
    with pytest.raises(PimergeError, match=f"--rank is {rank}"):
        merge(pool, [1.0, 0, 0], rank=rank)


def test_another_base_is_refused_by_name(pool: list[Expert]) -> None:
    set_config(pool[1].path, base_model_name_or_path="org/other")
    with pytest.raises(PimergeError, match="'e1' has the base 'org/other', 'e0' has the base 'org/base'"):
        pimerge.merging.merge.merge([pool[0], pool[1].path], output=None)


def test_nan_is_refused_with_expert_and_tensor(pool: list[Expert]) -> None:
    set_tensors(pool[1].path, {PREFIX + "q.lora_A.weight": torch.full((2, 6), math.nan)})
    with pytest.raises(PimergeError, match=r"'e1': .*q\.lora_A\.weight holds 12 values"):
        merge([pool[0], open_expert(pool[1].path)], [0.5, 0.5])


POOL = {"q": [(9, 2, 8), (9, 3, 8), (9, 1, 8)], "v": [(7, 2, 8), (7, 3, 8), None]}
"""Module → (d_out, r, d_in) of each expert; the third does not adapt v."""


def mixed(folder: Path, change: bool = False) -> list[Expert]:
    """Experts of different ranks and scalings; with ``change`` the same updates from other factors."""
    experts = []
    for i in range(3):
        updates = {}
        for name, shapes in POOL.items():
            if (shape := shapes[i]) is None:
                continue
            A, B = updates_of({name: shape}, 10 * i)[name]
            if change:
                R = normal(len(A), len(A), seed=5).to(F64) + 2 * torch.eye(len(A), dtype=F64)
                A, B = torch.linalg.solve(R, A.to(F64)), B.to(F64) @ R
            updates[name] = (A.to(F64), B.to(F64))
        experts.append(open_expert(raw_expert(folder / str(i), updates, lora_alpha=2.0 + i)))
    return experts


def stacked(experts: Sequence[Expert], name: str) -> Tensor:
    """ΔW of one module, zero for an expert without it."""
    d_out, _, d_in = POOL[name][0]
    return torch.stack([dense_deltas(expert).get(name, torch.zeros(d_out, d_in, dtype=F64)) for expert in experts])


def canonical(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors of the updates side by side, and of them one above the other, from dense matrices."""
    left = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat(list(deltas)), full_matrices=False)[2].T
    rank = int(torch.linalg.matrix_rank(torch.cat(list(deltas), 1)))
    return left[:, :rank], right[:, :rank]


RANDOM = ("dare-linear", "dare-ties", "della")
EVERYWHERE = [n for n in METHODS.names() if n not in (*RANDOM, "slerp", "fisher", "regmean")]
TWO_THIRDS = [0.5, 0.3, 0.2]


@pytest.mark.parametrize("method", EVERYWHERE)
def test_a_merge_of_files_is_the_dense_reference(method: str, tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    chosen = open_method(method)
    weights = chosen.weights(3, None if method == "uniform" else TWO_THIRDS)
    found = dense(merge(experts, weights, method))
    for name in POOL:
        deltas = stacked(experts, name)
        reference = REFERENCES[method]
        if method == "core-space":
            factors = [
                (e.factors(name).scaling * e.factors(name).B, e.factors(name).A)
                if name in e.modules
                else (torch.zeros(len(deltas[0]), 0, dtype=F64), torch.zeros(0, len(deltas[0][0]), dtype=F64))
                for e in experts
            ]
            expected = reference(deltas, weights, factors=factors)
        elif chosen.space == "elementwise":
            left, right = canonical(deltas)
            expected = left @ reference(left.T @ deltas @ right, weights) @ right.T
        else:
            expected = reference(deltas, weights)
        assert relative_difference(found[name], expected) <= 1e-5, name


@pytest.mark.parametrize("method", ["ties", "magnitude", "breadcrumbs"])
def test_the_space_delta_is_the_dense_reference(method: str, tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    found = dense(merge(experts, TWO_THIRDS, method, space="delta"))
    for name in POOL:
        assert relative_difference(found[name], REFERENCES[method](stacked(experts, name), TWO_THIRDS)) <= 1e-5


@pytest.mark.parametrize("method", [n for n in METHODS.names() if n not in ("fisher", "regmean")])
def test_neither_order_nor_factoring_changes_a_merge(method: str, tmp_path: Path) -> None:
    chosen = open_method(method)
    count = 2 if method == "slerp" else 3
    weights = chosen.weights(count, None if method == "uniform" else [0.6, 0.4] if count == 2 else TWO_THIRDS)
    plain = mixed(tmp_path / "a")[:count]
    turned = mixed(tmp_path / "b", change=True)[:count]
    expected = dense(merge(plain, weights, method, seed=3))
    assert_same(dense(merge(plain[::-1], weights[::-1], method, seed=3)), expected, 1e-6)
    if method not in (*RANDOM, "core-space"):  # those say why in BREAKS, or draw by the expert's content
        assert_same(dense(merge(turned, weights, method)), expected, 1e-6)


@pytest.mark.parametrize("method", RANDOM)
def test_a_random_method_is_decided_by_its_seed_and_right_in_the_mean(method: str, tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    first, again, other = (dense(merge(experts, TWO_THIRDS, method, seed=seed)) for seed in (1, 1, 2))
    assert_same(again, first, 0.0)
    assert relative_difference(other["q"], first["q"]) > 0.1
    if method == "dare-linear":
        mean = torch.stack([dense(merge(experts, TWO_THIRDS, method, seed=s))["q"] for s in range(400)]).mean(0)
        assert relative_difference(mean, dense(merge(experts, TWO_THIRDS))["q"]) < 0.1


def test_slerp_keeps_the_length_on_the_arc(tmp_path: Path) -> None:
    experts = mixed(tmp_path)[:2]
    found = dense(merge(experts, [0.3, 0.7], "slerp"))
    for name in POOL:
        expected = REFERENCES["slerp"](stacked(experts, name), [0.3, 0.7])
        assert relative_difference(found[name], expected) <= 1e-9


def test_equal_experts_are_joined_and_their_weights_added(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    given = prepare([experts[0], experts[1], experts[0]], [0.2, 0.5, 0.3], open_method("ties"))
    assert [expert.name for expert in given.experts] == ["0", "1"]
    assert given.weights["q"] == [0.5, 0.5]
    assert given.joined == {"0": 2}


def shared_init(folder: Path, count: int = 3) -> list[Expert]:
    """Experts whose factors A lie near one init."""
    start = normal(3, 40, seed=1)
    return [
        open_expert(
            raw_expert(folder / f"s{i}", {"q": (start + 0.1 * normal(3, 40, seed=2 + i), normal(9, 3, seed=9 + i))})
        )
        for i in range(count)
    ]


def test_fisher_weighs_every_parameter_by_its_information(tmp_path: Path) -> None:
    experts = shared_init(tmp_path)
    diagonals = {
        (e.name, key): normal(*e.tensor(key).shape, seed=10 * i + n).square()
        for i, e in enumerate(experts)
        for n, key in enumerate(e.file.entries)
    }
    (found,) = merge(experts, [0.2, 0.5, 0.3], "fisher", fisher=lambda e, key: diagonals[e.name, key], dtype=F64)
    for letter, got in (("A", found.factors.A), ("B", found.factors.B)):
        key = getattr(experts[0].modules["q"], letter)
        shares = torch.stack(
            [w * diagonals[e.name, key].to(F64) for w, e in zip([0.2, 0.5, 0.3], experts, strict=True)]
        )
        values = torch.stack([e.tensor(key).to(F64) for e in experts])
        assert relative_difference(got, (shares * values).sum(0) / shares.sum(0)) <= 1e-4  # the floor of 1e-6


def test_fisher_weighs_a_scaled_expert_as_the_whole_one(tmp_path: Path) -> None:
    """Its information was measured at full strength; a weaker update does not say more."""
    experts = [
        expert.with_strength(scale) for expert, scale in zip(shared_init(tmp_path), (0.5, 1.0, 0.0), strict=True)
    ]
    keys = experts[0].file.entries
    diagonals = {
        (e.name, key): normal(*e.tensor(key).shape, seed=10 * i + n).square()
        for i, e in enumerate(experts)
        for n, key in enumerate(keys)
    }
    (found,) = merge(experts, [0.2, 0.5, 0.3], "fisher", fisher=lambda e, key: diagonals[e.name, key], dtype=F64)
    key = experts[0].modules["q"].B
    shares = torch.stack([w * diagonals[e.name, key].to(F64) for w, e in zip([0.2, 0.5, 0.3], experts, strict=True)])
    values = torch.stack([e.strength * e.tensor(key).to(F64) for e in experts])
    assert relative_difference(found.factors.B, (shares * values).sum(0) / shares.sum(0)) <= 1e-4  # the floor of 1e-6


def test_one_expert_at_two_scales_counts_as_two(pool: list[Expert]) -> None:
    prepared = prepare([pool[0], pool[0].with_strength(0.5), pool[0]], [0.5, 0.3, 0.2], open_method("interpolated"))
    assert [expert.strength for expert in prepared.experts] == [1.0, 0.5]
    expected = {name: (0.7 + 0.3 * 0.5) * scaled(0, name) for name in SHAPES}
    assert_same(dense([prepared.module(name) for name in prepared.names]), expected, rel=1e-6)


def test_entry_by_entry_methods_refuse_experts_of_another_init_or_form(tmp_path: Path) -> None:
    experts = shared_init(tmp_path)
    other = open_expert(raw_expert(tmp_path / "far", {"q": (normal(3, 40, seed=77), normal(9, 3, seed=7))}))
    wide = open_expert(raw_expert(tmp_path / "wide", {"q": (normal(4, 40, seed=77), normal(9, 4, seed=7))}))
    with pytest.raises(PimergeError, match=r"(?s)'far': it was trained from another init.*'wide': its rank is 4"):
        merge([*experts, other, wide], [0.2] * 5, "ties", space="factors")


def test_regmean_is_the_dense_reference(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    grams = {e.name: (x := normal(20, 8, seed=i).to(F64)).T @ x / 20 for i, e in enumerate(experts)}
    found = dense(
        merge(experts, TWO_THIRDS, "regmean", gram=lambda e, name: grams[e.name] if name in e.modules else None)
    )
    expected = REFERENCES["regmean"](stacked(experts, "q"), TWO_THIRDS, grams=list(grams.values()))
    assert relative_difference(found["q"], expected) <= 1e-6
    known = [grams["0"], grams["1"], (grams["0"] + grams["1"]) / 2]  # the third, without v, counts with the mean
    expected = REFERENCES["regmean"](stacked(experts, "v"), TWO_THIRDS, grams=known)
    assert relative_difference(found["v"], expected) <= 1e-6


def test_only_selected_modules_are_merged(pool: list[Expert]) -> None:
    assert [part.module.name for part in merge(pool, [1.0, 0, 0], selected=lambda name: name == "v")] == ["v"]
    with pytest.raises(PimergeError, match="no module is left"):
        merge(pool, [1.0, 0, 0], selected=lambda name: False)


def test_a_space_is_for_elementwise_methods(pool: list[Expert]) -> None:
    with pytest.raises(PimergeError, match="elementwise"):
        merge(pool, [1.0, 0, 0], space="delta")
