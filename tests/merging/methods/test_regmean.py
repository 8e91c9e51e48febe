"""The nearest outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.merging.methods import regmean
from tests.support.merge_cases import F64, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal


def grams_of(count: int, d_in: int = 9, examples: int = 20) -> list[Tensor]:
    """XᵀX of inputs of which the last is dead."""
    grams = []
    for n in range(count):
        X = normal(examples, d_in, seed=50 + n).to(F64)
        X[:, -1] = 0
        grams.append(X.mT @ X)
    return grams


def test_the_outputs_are_the_nearest() -> None:
    deltas, grams = low_rank([4, 4], (5, 9)).deltas, [gram + torch.eye(9, dtype=F64) for gram in grams_of(2)]
    weights = torch.tensor([0.5, 0.5], dtype=F64)
    found = sum(regmean.transformed(list(deltas), weights, grams=grams, offdiagonal=1.0))
    gradient = sum((found - delta) @ gram for delta, gram in zip(deltas, grams, strict=True))
    assert float(gradient.norm()) < 1e-5 * float(grams[0].norm())


@pytest.mark.parametrize("offdiagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("examples", [1, 20])
def test_it_is_the_reference_through_the_factors(offdiagonal: float, examples: int) -> None:
    case, weights, grams = low_rank(), weights_of(3), grams_of(3, examples=examples)
    rows = regmean.transformed([A for _, A in case.factors], weights, grams=grams, offdiagonal=offdiagonal)
    found = sum((B @ row for (B, _), row in zip(case.factors, rows, strict=True)), torch.zeros(12, 9, dtype=F64))
    close(found, REFERENCES["regmean"](case.deltas, weights, grams=grams, offdiagonal=offdiagonal), relative=1e-7)


def test_a_dead_input_gets_the_weighted_mean() -> None:
    deltas, weights = low_rank().deltas, weights_of(3)
    found = sum(regmean.transformed(list(deltas), weights, grams=grams_of(3)))
    close(found[:, -1], torch.tensordot(weights / weights.sum(), deltas, dims=1)[:, -1])


def test_without_any_input_it_is_the_weighted_mean() -> None:
    deltas, grams = low_rank().deltas, list(torch.zeros(3, 9, 9))
    close(
        sum(regmean.transformed(list(deltas), weights_of(3), grams=grams)),
        torch.tensordot(weights_of(3) / weights_of(3).sum(), deltas, dims=1),
    )


def test_one_expert_comes_back_from_few_examples() -> None:
    rows = [low_rank([3]).factors[0][1]]
    found = regmean.transformed(rows, torch.ones(1, dtype=F64), grams=grams_of(1, examples=2), offdiagonal=1.0)
    assert torch.equal(found[0], rows[0])


def test_what_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(PimergeError, match="not positive semidefinite"):
        regmean.transformed([torch.ones(1, 2)], torch.ones(1), grams=[torch.tensor([[1.0, 0.0], [0.0, -1.0]])])
