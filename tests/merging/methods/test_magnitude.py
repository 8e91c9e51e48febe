"""The largest entries."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from pimerge.merging.methods import magnitude
from tests.support.merge_cases import Case, cases, close, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal, small


def test_the_numbers_by_hand() -> None:
    deltas = torch.tensor([[1.0, -3.0, 2.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
    assert magnitude.merge(deltas, torch.tensor([1.0, 0.5]), scale=2.0).tolist() == [4.0, -2.0, 4.0, 0.0]


def test_it_is_that_of_peft() -> None:
    deltas, weights = list(normal(3, 8, 6)), torch.tensor([0.5, 0.2, -1.0])
    expected = merge_utils.magnitude_prune(deltas, weights, 0.4)
    torch.testing.assert_close(magnitude.merge(torch.stack(deltas), weights, density=0.4), expected)


@small
@given(cases(), st.sampled_from([0.2, 0.5, 1.0]))
def test_it_is_the_reference(case: Case, density: float) -> None:
    weights, options = weights_of(len(case.deltas)), {"density": density, "scale": 1.5}
    close(magnitude.merge(case.deltas, weights, **options), REFERENCES["magnitude"](case.deltas, weights, **options))
