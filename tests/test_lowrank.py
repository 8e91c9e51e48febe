"""Sums of low-rank updates, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pimerge.kinds.lora import Factors, LoraModule
from pimerge.lowrank import MergedModule, merge_module, relative_error, to_cores, truncated_factors
from pimerge.merge_methods.uniform import merge as weighted_sum
from tests.raw import normal, small

F64 = torch.float64


def factors(d_out: int, d_in: int, rank: int, seed: int = 0, scaling: float = 1.0) -> Factors:
    """Normal factors."""
    return Factors(normal(rank, d_in, seed=seed), normal(d_out, rank, seed=seed + 50), scaling)


def dense(part: Factors) -> Tensor:
    """ΔW = s B A."""
    return part.scaling * part.B.to(F64) @ part.A.to(F64)


def module(d_out: int, d_in: int) -> LoraModule:
    """A layout; only its shapes matter here."""
    return LoraModule("q", "A", "B", None, 1, 1.0, 1.0, "linear", (1, d_in), (d_out, 1))


sizes = st.integers(1, 8)
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
scales = st.sampled_from([1e-6, 0.3, 1.0, 16.0, 1e6])


@small
@given(sizes, sizes, ranks, scales)
def test_cores_are_the_updates_in_one_orthonormal_basis(d_out: int, d_in: int, ranks: list[int], scale: float) -> None:
    parts = [factors(d_out, d_in, rank, seed, scale) for seed, rank in enumerate(ranks)]
    U, V, cores = to_cores(parts)
    assert U.shape[1] <= min(d_out, sum(ranks))
    assert V.shape[1] <= min(d_in, sum(ranks))
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=F64))
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1], dtype=F64))
    for part, core in zip(parts, cores, strict=True):
        expected = dense(part)
        torch.testing.assert_close(U @ core @ V.T, expected, rtol=1e-11, atol=1e-12 * float(expected.norm()))
        size = min(core.shape + expected.shape)
        singular = torch.linalg.svdvals(expected)
        torch.testing.assert_close(
            torch.linalg.svdvals(core)[:size], singular[:size], rtol=1e-9, atol=1e-12 * float(singular[0])
        )


@small
@given(sizes, sizes, ranks, st.integers(1, 9), scales)
def test_a_truncation_is_the_best_of_its_rank_and_knows_its_error(
    d_out: int, d_in: int, ranks: list[int], rank: int, scale: float
) -> None:
    parts = [factors(d_out, d_in, r, seed, scale) for seed, r in enumerate(ranks)]
    weights = [0.4 - 0.3 * i for i in range(len(parts))]
    merged = merge_module(module(d_out, d_in), parts, weights, weighted_sum, rank=rank, dtype=F64)
    expected = sum(
        (weight * dense(part) for weight, part in zip(weights, parts, strict=True)), torch.zeros((), dtype=F64)
    )
    singular = torch.linalg.svdvals(expected)
    norm, best = float(expected.norm()), float(singular[rank:].norm())
    assert merged.rank <= rank
    assert merged.energy == pytest.approx(norm**2, rel=1e-9)
    assert float((dense(merged.factors) - expected).norm()) == pytest.approx(best, rel=1e-6, abs=1e-9 * norm)
    assert merged.error == pytest.approx(best / norm, rel=1e-6, abs=1e-9)


def test_without_a_rank_every_direction_is_kept_and_no_more() -> None:
    parts = [factors(9, 8, 2, 1), factors(9, 8, 3, 2)]
    for rank in (None, 5, 50):
        merged = merge_module(module(9, 8), parts, [0.7, -0.2], weighted_sum, rank=rank, dtype=F64)
        assert (merged.rank, merged.lost) == (5, 0.0)
        expected = 0.7 * dense(parts[0]) - 0.2 * dense(parts[1])
        torch.testing.assert_close(dense(merged.factors), expected, rtol=0, atol=1e-12)


def test_the_singular_values_are_shared_evenly() -> None:
    merged = merge_module(module(9, 8), [factors(9, 8, 3)], [0.5], weighted_sum, rank=None, dtype=F64)
    rows, columns = merged.factors.A.norm(dim=1), merged.factors.B.norm(dim=0)
    torch.testing.assert_close(rows, columns)
    torch.testing.assert_close(rows * columns, torch.linalg.svdvals(0.5 * dense(factors(9, 8, 3)))[:3])


def test_one_expert_at_weight_one_keeps_its_factors_bit_by_bit() -> None:
    part = factors(5, 6, 3, scaling=4.0)
    merged = merge_module(module(5, 6), [None, part], [7.0, 1.0], weighted_sum, rank=3, dtype=torch.float32)
    assert torch.equal(merged.factors.A, part.A)
    assert torch.equal(merged.factors.B, 4 * part.B)
    assert merged.energy == pytest.approx(float(dense(part).square().sum()), rel=1e-12)
    truncated = merge_module(module(5, 6), [part], [1.0], weighted_sum, rank=2, dtype=F64)
    assert truncated.error == pytest.approx(
        float(torch.linalg.svdvals(dense(part))[2:].norm() / dense(part).norm()), rel=1e-9
    )


def test_a_core_of_zeros_has_rank_one_and_loses_nothing() -> None:
    A, B, energy, lost = truncated_factors(
        torch.zeros(2, 2, dtype=F64), torch.eye(4, 2, dtype=F64), torch.eye(3, 2, dtype=F64), None
    )
    assert (A.shape, B.shape, energy, lost) == ((1, 3), (4, 1), 0.0, 0.0)
    assert not (B @ A).any()
    assert relative_error([]) == 0.0
    assert MergedModule(module(4, 3), Factors(A, B, 1.0), energy, lost).error == 0.0


def test_the_error_over_modules_is_that_of_all_of_them_as_one() -> None:
    merged = [
        merge_module(module(6, 6), [factors(6, 6, 4, seed)], [scale], weighted_sum, rank=2, dtype=F64)
        for seed, scale in ((1, 1.5), (2, 20.0))
    ]
    whole = torch.block_diag(1.5 * dense(factors(6, 6, 4, 1)), 20 * dense(factors(6, 6, 4, 2)))
    kept = torch.block_diag(*(dense(m.factors) for m in merged))
    assert relative_error(merged) == pytest.approx(float((whole - kept).norm() / whole.norm()), rel=1e-9)


def test_biases_are_summed_with_weight_and_scaling() -> None:
    first = Factors(normal(1, 3), normal(2, 1), 2.0, torch.tensor([1.0, -1.0]))
    second = Factors(normal(1, 3), normal(2, 1), 3.0)
    third = Factors(normal(1, 3), normal(2, 1), 0.5, torch.tensor([4.0, 8.0]))
    merged = merge_module(
        module(2, 3), [first, second, None, third], [0.5, 0.2, 0.1, 0.25], weighted_sum, rank=None, dtype=F64
    )
    assert merged.factors.bias is not None
    assert merged.factors.bias.tolist() == [1.5, 0.0]
