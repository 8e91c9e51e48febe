"""Trim, elect, mean."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from pimerge.merging.methods import _trim, ties
from tests.support.merge_cases import F64, Case, cases, close, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal, small


def test_the_numbers_by_hand() -> None:
    deltas = torch.tensor([[4.0, 1.0, -3.0, 0.5, 2.0], [2.0, -5.0, 3.5, 0.2, -6.0]])
    # trimmed: 4 . -3 . 2 and . -5 3.5 . -6
    found = ties.merge(deltas, torch.tensor([0.5, 0.5]), density=0.6, scale=2.0)
    assert found.tolist() == [8.0, -10.0, 7.0, 0.0, -12.0]


def test_equal_experts_come_back_as_the_trimmed_expert() -> None:
    delta = normal(4, 5)
    found = ties.merge(delta.expand(2, 4, 5), torch.tensor([0.5, 0.5]), density=0.5)
    torch.testing.assert_close(found, _trim.trim(delta[None], 0.5)[0])


def test_exactly_so_many_are_kept_although_many_are_equal() -> None:
    trimmed = _trim.trim(torch.ones(2, 5, 5), density=0.2)
    assert trimmed.count_nonzero(dim=(1, 2)).tolist() == [5, 5]
    assert trimmed[0].flatten().tolist() == [1.0] * 5 + [0.0] * 20


def test_a_negative_weight_stands_for_the_negated_expert() -> None:
    deltas = normal(2, 4, 5).to(F64)
    negated = deltas * torch.tensor([1.0, -1.0])[:, None, None]
    found = ties.merge(deltas, torch.tensor([0.7, -0.3], dtype=F64))
    assert torch.equal(found, ties.merge(negated, torch.tensor([0.7, 0.3], dtype=F64)))


def test_at_equal_weights_of_one_it_is_that_of_peft() -> None:
    deltas = list(normal(3, 8, 6))
    for density in (0.2, 0.5):
        expected = merge_utils.ties(deltas, torch.ones(3), density)
        torch.testing.assert_close(ties.merge(torch.stack(deltas), torch.ones(3), density=density), expected)


@small
@given(cases(), st.sampled_from([0.2, 0.55, 1.0]))
def test_it_is_the_reference(case: Case, density: float) -> None:
    weights = weights_of(len(case.deltas))
    close(ties.merge(case.deltas, weights, density=density), REFERENCES["ties"](case.deltas, weights, density=density))
