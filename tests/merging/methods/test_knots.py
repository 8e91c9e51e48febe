"""Aligned by one decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from pimerge.merging.methods import knots
from tests.support.merge_cases import Case, cases, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_linear_is_the_weighted_sum() -> None:
    case, weights = low_rank(), weights_of(3)
    found = knots.merge(case.deltas, weights, inner_method="linear", scale=2.0)
    close(found, 2 * torch.tensordot(weights, case.deltas, dims=1), relative=1e-13)


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_it_is_the_reference_on_the_dense_updates(density: float) -> None:
    case, weights = low_rank(), weights_of(3)
    found = case.U @ knots.merge(case.U.mT @ case.deltas, weights, density=density)
    close(found, REFERENCES["knots"](case.deltas, weights, density=density))


@small
@given(cases())  # untrimmed: a square V has pairs of entries of equal magnitude, of which rounding would choose
def test_untrimmed_it_is_the_reference_for_any_experts(case: Case) -> None:
    weights = weights_of(len(case.deltas))
    found = case.U @ knots.merge(case.U.mT @ case.deltas, weights, density=1.0)
    close(found, REFERENCES["knots"](case.deltas, weights, density=1.0), relative=1e-8)
