"""The exact minimum."""

from __future__ import annotations

import torch
from hypothesis import given

from pimerge.merging.methods import wudi
from tests.support.merge_cases import F64, Case, cases, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_experts_with_orthogonal_inputs_are_added() -> None:
    deltas = torch.zeros(2, 2, 2, dtype=F64)
    deltas[0, :, 0], deltas[1, :, 1] = torch.tensor([1.0, 2.0]), torch.tensor([30.0, 40.0])
    close(wudi.merge(deltas, torch.ones(2, dtype=F64)), deltas.sum(0))


def test_gradient_descent_on_the_objective_ends_there() -> None:
    deltas, weights = low_rank([3, 2], (4, 4)).deltas, torch.tensor([0.7, 0.3], dtype=F64)
    found = wudi.merge(deltas, weights).requires_grad_()
    distances = ((found - deltas) @ deltas.mT).square().sum((1, 2)) / deltas.square().sum((1, 2))
    gradient = torch.autograd.grad((weights * distances).sum(), found)[0]
    assert float(gradient.norm()) < 1e-12


def test_only_ratios_of_the_weights_count() -> None:
    deltas, weights = low_rank().deltas, weights_of(3)
    close(wudi.merge(deltas, 7 * weights), wudi.merge(deltas, weights))


def test_copies_that_differ_by_rounding_give_the_expert() -> None:
    delta = low_rank([2]).deltas[0]
    copies = torch.stack([delta, delta.float().to(F64)])
    close(wudi.merge(copies, torch.ones(2, dtype=F64)), delta, relative=1e-6)


@small
@given(cases())
def test_it_is_the_reference_on_the_dense_updates(case: Case) -> None:
    weights = weights_of(len(case.deltas))
    found = case.U @ wudi.merge(case.cores, weights) @ case.V.mT
    close(found, REFERENCES["wudi"](case.deltas, weights), relative=1e-6)
