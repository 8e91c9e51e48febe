"""Sums of low-rank updates, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import (
    EVERYTHING,
    Cores,
    Truncated,
    Truncation,
    inner_products,
    orthonormal_basis,
    to_cores,
    truncated_dense,
    weighted_bias,
    weighted_sum,
)
from pimerge.adapters.merged_module import Summary, relative_error
from pimerge.core.errors import PimergeError
from tests.support.numerics import normal, small

F64 = torch.float64


def factors(d_out: int, d_in: int, rank: int, seed: int = 0, scaling: float = 1.0) -> Factors:
    """Normal factors."""
    return Factors(normal(rank, d_in, seed=seed), normal(d_out, rank, seed=seed + 50), scaling)


def dense(part: Factors) -> Tensor:
    """ΔW = s B A."""
    return part.scaling * part.B.to(F64) @ part.A.to(F64)


sizes = st.integers(1, 8)
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
scales = st.sampled_from([1e-6, 0.3, 1.0, 16.0, 1e6])


def whole(cores: Cores, core: Tensor) -> Tensor:
    """U · core · Vᵀ."""
    return cores.U.times(cores.V.times(core.T).T)


def summary(found: Truncated) -> Summary:
    """What a merge remembers of a truncation."""
    return Summary("q", len(found.factors.A), found.energy, found.lost, None)


def total(parts: list[Factors], weights: list[float]) -> Tensor:
    """Σ w_n ΔW_n, dense."""
    return torch.stack([weight * dense(part) for weight, part in zip(weights, parts, strict=True)]).sum(0)


@small
@given(sizes, sizes, ranks, scales)
def test_cores_are_the_updates_in_one_orthonormal_basis(d_out: int, d_in: int, ranks: list[int], scale: float) -> None:
    parts = [factors(d_out, d_in, rank, seed, scale) for seed, rank in enumerate(ranks)]
    given_cores = to_cores(parts)
    for cores in (given_cores, given_cores.canonical(), given_cores.reference()):
        stacked = cores.stacked()
        R, columns = stacked.shape[1:]
        assert min(d_out, sum(ranks)) >= R
        assert columns <= min(d_in, sum(ranks))
        for basis, size in ((cores.U, R), (cores.V, columns)):
            U = basis.times(torch.eye(size, dtype=F64))
            torch.testing.assert_close(U.T @ U, torch.eye(size, dtype=F64))
        for part, core in zip(parts, stacked, strict=True):
            expected = dense(part)
            torch.testing.assert_close(whole(cores, core), expected, rtol=1e-11, atol=1e-12 * float(expected.norm()))


def test_canonical_cores_do_not_depend_on_order_or_factoring_but_for_signs() -> None:
    parts = [factors(12, 10, 2, seed, 1.0 + seed) for seed in range(3)]
    turned = []
    for part in parts:
        R = normal(2, 2, seed=9).to(F64) + 2 * torch.eye(2, dtype=F64)
        turned.append(Factors(torch.linalg.inv(R) @ part.A.to(F64), part.B.to(F64) @ R, part.scaling))
    first = to_cores(parts).canonical().stacked()
    second = to_cores(turned[::-1]).canonical().stacked().flip(0)
    torch.testing.assert_close(second.abs(), first.abs(), rtol=0, atol=1e-9)


def test_reference_cores_are_in_the_singular_vectors_of_the_stacked_factors() -> None:
    parts = [factors(12, 10, 2, seed, 1.0 + seed) for seed in range(3)]
    left = torch.linalg.svd(torch.cat([part.scaling * part.B.to(F64) for part in parts], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([part.A.to(F64) for part in parts]), full_matrices=False)[2]
    for part, core in zip(parts, to_cores(parts).reference().stacked(), strict=True):
        torch.testing.assert_close(core.abs(), (left.T @ dense(part) @ right.T).abs(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay", [1.0, 1e-3, 1e-9, 0.0])
def test_many_columns_have_as_good_a_basis(decay: float) -> None:
    """From 128 columns on it comes from the Gram matrix, or from QR where the columns are nearly dependent."""
    shared = normal(300, 8, seed=1).to(F64)
    stacks = [shared + decay * normal(300, 8, seed=2 + i).to(F64) for i in range(20)]
    basis, coordinates = orthonormal_basis(stacks)
    U = basis.times(torch.eye(coordinates[0].shape[0], dtype=F64))
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=F64), rtol=0, atol=1e-9)
    for stack, own in zip(stacks, coordinates, strict=True):
        assert float((U @ own - stack).norm()) <= 1e-9 * float(stack.norm())


def test_a_small_update_keeps_its_digits_beside_a_large_one() -> None:
    parts = [factors(400, 300, 70, 1, 1e6), factors(400, 300, 70, 2, 1e-6)]
    cores = to_cores(parts)
    for part, core in zip(parts, cores.stacked(), strict=True):
        assert float((whole(cores, core) - dense(part)).norm()) <= 1e-9 * float(dense(part).norm())


@small
@given(sizes, sizes, ranks, st.integers(1, 9), scales)
def test_a_truncation_is_the_best_of_its_rank_and_knows_its_error(
    d_out: int, d_in: int, ranks: list[int], rank: int, scale: float
) -> None:
    parts = [factors(d_out, d_in, r, seed, scale) for seed, r in enumerate(ranks)]
    weights = [0.4 - 0.3 * i for i in range(len(parts))]
    expected = total(parts, weights)
    singular = torch.linalg.svdvals(expected)
    norm, best = float(expected.norm()), float(singular[rank:].norm())
    for found in (weighted_sum(parts, weights, Truncation(rank), F64), truncated_dense(expected, Truncation(rank))):
        assert summary(found).rank <= rank
        assert found.energy == pytest.approx(norm**2, rel=1e-9)
        assert float((dense(found.factors) - expected).norm()) == pytest.approx(best, rel=1e-6, abs=1e-9 * norm)
        assert summary(found).error == pytest.approx(best / norm, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_an_energy_takes_the_least_rank_that_keeps_it(energy: float) -> None:
    parts = [factors(9, 8, 2, 1), factors(9, 8, 3, 2)]
    squares = torch.linalg.svdvals(total(parts, [1.0, 1.0])).square()[:5]
    shares = (squares.cumsum(0) / squares.sum()).tolist()
    least = next(rank for rank, share in enumerate(shares, 1) if share >= energy - 1e-9)
    found = weighted_sum(parts, [1.0, 1.0], Truncation(energy=energy), F64)
    assert summary(found).rank == least
    assert found.lost / found.energy <= 1 - energy + 1e-9
    assert summary(weighted_sum(parts, [1.0, 1.0], Truncation(2, energy), F64)).rank == min(2, least)


@pytest.mark.parametrize(
    ("settings", "message"), [((0,), "--rank is 0"), ((None, 0.0), "--energy"), ((None, 1.5), "--energy")]
)
def test_a_truncation_out_of_range_is_refused(settings: tuple[float, ...], message: str) -> None:
    with pytest.raises(PimergeError, match=message):
        Truncation(*settings)  # type: ignore[arg-type]


def test_without_a_truncation_the_factors_stand_side_by_side() -> None:
    parts = [factors(9, 8, 2, 1, 0.5), factors(9, 8, 3, 2), factors(9, 8, 1, 3)]
    found = weighted_sum(parts, [0.7, -0.2, 0.0], EVERYTHING, torch.float32)
    assert torch.equal(found.factors.A, torch.cat([parts[0].A, parts[1].A]))
    torch.testing.assert_close(found.factors.B, torch.cat([0.35 * parts[0].B, -0.2 * parts[1].B], 1))
    assert (found.energy, found.lost) == (0.0, 0.0)
    nothing = weighted_sum(parts, [0.0, 0.0, 0.0], EVERYTHING, torch.float32)
    assert not nothing.factors.B.any()


def test_more_directions_than_the_matrix_has_become_as_many_as_it_has() -> None:
    parts = [factors(4, 8, 3, seed) for seed in range(3)]
    found = weighted_sum(parts, [0.3, 0.3, 0.4], EVERYTHING, F64)
    assert summary(found).rank == 4
    torch.testing.assert_close(dense(found.factors), total(parts, [0.3, 0.3, 0.4]), rtol=0, atol=1e-12)


def test_the_singular_values_are_shared_evenly() -> None:
    found = weighted_sum([factors(9, 8, 3)], [0.5], Truncation(energy=1.0), F64)
    rows, columns = found.factors.A.norm(dim=1), found.factors.B.norm(dim=0)
    torch.testing.assert_close(rows, columns)
    torch.testing.assert_close(rows * columns, torch.linalg.svdvals(0.5 * dense(factors(9, 8, 3)))[:3])


def test_an_update_of_zeros_has_rank_one_and_loses_nothing() -> None:
    found = weighted_sum([factors(4, 3, 2, scaling=0.0)], [1.0], Truncation(2), F64)
    assert (summary(found).rank, found.energy, found.lost) == (1, 0.0, 0.0)
    assert not dense(found.factors).any()
    assert relative_error([]) == summary(found).error == 0.0


def test_the_error_over_modules_is_that_of_all_of_them_as_one() -> None:
    found = [
        weighted_sum([factors(6, 6, 4, seed)], [scale], Truncation(2), F64) for seed, scale in ((1, 1.5), (2, 20.0))
    ]
    every = torch.block_diag(1.5 * dense(factors(6, 6, 4, 1)), 20 * dense(factors(6, 6, 4, 2)))
    kept = torch.block_diag(*(dense(part.factors) for part in found))
    error = relative_error([summary(part) for part in found])
    assert error == pytest.approx(float((every - kept).norm() / every.norm()), rel=1e-9)


@small
@given(sizes, sizes, ranks, scales)
def test_inner_products_are_those_of_the_dense_updates(d_out: int, d_in: int, ranks: list[int], scale: float) -> None:
    parts = [factors(d_out, d_in, rank, seed, scale) for seed, rank in enumerate(ranks)]
    flat = torch.stack([dense(part).flatten() for part in parts])
    found = inner_products(parts)
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-9, atol=1e-9 * float((flat @ flat.T).abs().max()))


def test_biases_are_summed_with_weight_and_scaling() -> None:
    first = Factors(normal(1, 3), normal(2, 1), 2.0, torch.tensor([1.0, -1.0]))
    second = Factors(normal(1, 3), normal(2, 1), 3.0)
    third = Factors(normal(1, 3), normal(2, 1), 0.5, torch.tensor([4.0, 8.0]))
    assert weighted_bias([first, second, third], [0.5, 0.2, 0.25], F64).tolist() == [1.5, 0.0]
