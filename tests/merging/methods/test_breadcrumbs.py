"""Neither the largest nor the smallest."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pimerge.merging.methods import breadcrumbs
from tests.support.merge_cases import Case, cases, close, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_the_numbers_by_hand() -> None:
    deltas = torch.tensor([[1.0, -3.0, 2.0, 9.0]])
    assert breadcrumbs.merge(deltas, torch.tensor([2.0]), density=0.5, gamma=0.25).tolist() == [0.0, -6.0, 4.0, 0.0]


def test_the_density_remains_although_gamma_would_take_more() -> None:
    deltas = torch.tensor([[1.0, -3.0, 2.0, 9.0]])
    found = breadcrumbs.merge(deltas, torch.tensor([1.0]), density=0.75, gamma=0.5)
    assert found.tolist() == [1.0, -3.0, 2.0, 0.0]


def test_equal_entries_leave_exactly_the_density() -> None:
    found = breadcrumbs.merge(torch.ones(1, 10), torch.ones(1), density=0.6, gamma=0.2)
    assert found.tolist() == [0.0] * 2 + [1.0] * 6 + [0.0] * 2


def test_a_single_entry_stays() -> None:
    assert breadcrumbs.merge(torch.ones(1, 1, 1), torch.ones(1), density=0.1, gamma=0.99).tolist() == [[1.0]]


@small
@given(cases(), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.01, 0.4]))
def test_it_is_the_reference(case: Case, density: float, gamma: float) -> None:
    weights, options = weights_of(len(case.deltas)), {"density": density, "gamma": gamma}
    found = breadcrumbs.merge(case.deltas, weights, **options)
    close(found, REFERENCES["breadcrumbs"](case.deltas, weights, **options))
