"""Inverse norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from pimerge.merging.methods import nan_weights
from tests.support.merge_cases import F64, Case, cases, close, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def inner_of(*norms: float) -> torch.Tensor:
    """Inner products of orthogonal updates."""
    return torch.diag(torch.tensor(norms, dtype=F64) ** 2)


def test_small_updates_count_for_more_and_all_sum_to_the_scale() -> None:
    found = nan_weights.coefficients(torch.ones(3, dtype=F64), inner=inner_of(1, 2, 4), scale=7.0)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 1.0], dtype=F64))


def test_a_zero_update_is_left_out() -> None:
    found = nan_weights.coefficients(torch.tensor([0.5, 0.3, 0.2], dtype=F64), inner=inner_of(1, 0, 2))
    torch.testing.assert_close(found, torch.tensor([5 / 6, 0.0, 1 / 6], dtype=F64))


def test_all_updates_may_be_zero() -> None:
    assert nan_weights.coefficients(torch.ones(2, dtype=F64), inner=inner_of(0, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_the_unit_of_the_updates_does_not_matter(scale: float) -> None:
    found = nan_weights.coefficients(torch.ones(2, dtype=F64), inner=inner_of(scale, 3 * scale))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25], dtype=F64))


@small
@given(cases())
def test_it_is_the_reference(case: Case) -> None:
    weights, deltas = weights_of(len(case.deltas)), case.deltas
    inner = torch.einsum("nij,mij->nm", deltas, deltas)
    found = torch.tensordot(nan_weights.coefficients(weights, inner=inner), deltas, dims=1)
    close(found, REFERENCES["nan-weights"](deltas, weights))
