"""The arc."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from pimerge.core.errors import PimergeError
from pimerge.merging.methods import slerp
from tests.support.merge_cases import F64, Case, cases, close
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def merged(deltas: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """The weighted sum with the coefficients of the arc."""
    inner = torch.einsum("nij,mij->nm", deltas, deltas)
    return torch.tensordot(slerp.coefficients(torch.tensor(weights, dtype=F64), inner=inner), deltas, dims=1)


def test_a_third_of_a_right_angle_is_30_degrees() -> None:
    found = merged(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=F64), [2 / 3, 1 / 3])
    torch.testing.assert_close(found, torch.tensor([[0.75**0.5, 0.5]], dtype=F64))


def test_the_length_stays_along_the_arc() -> None:
    deltas = torch.tensor([[[3.0, 0.0]], [[1.8, 2.4]]], dtype=F64)
    assert float(merged(deltas, [0.3, 0.7]).norm()) == pytest.approx(3.0, abs=1e-14)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-5])
def test_nearly_parallel_updates_meet_the_straight_line(angle: float) -> None:
    turned = torch.tensor([angle, 0.0], dtype=F64)
    deltas = torch.stack([torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64) + turned])
    torch.testing.assert_close(merged(deltas, [0.4, 0.6]), 0.4 * deltas[0] + 0.6 * deltas[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("other", [-2.0, 0.0])
def test_opposite_and_zero_updates_go_straight(other: float) -> None:
    deltas = torch.tensor([[[1.0, 1.0]], [[other, other]]], dtype=F64)
    torch.testing.assert_close(merged(deltas, [0.5, 0.5]), 0.5 * deltas.sum(0))


def test_it_joins_two_at_weights_of_sum_one() -> None:
    assert slerp.weights(1, None) == [1.0]
    assert slerp.weights(2, [0.3, 0.7]) == [0.3, 0.7]
    with pytest.raises(PimergeError, match="'slerp' merges two experts; got 3"):
        slerp.weights(3, None)
    with pytest.raises(PimergeError, match=r"the weights of 'slerp' sum to 1.2\n.*1 − t and t"):
        slerp.weights(2, [0.5, 0.7])


@small
@given(cases(most=2))
def test_it_is_the_reference(case: Case) -> None:
    weights = [1.0] if len(case.deltas) == 1 else [0.3, 0.7]
    close(merged(case.deltas, weights), REFERENCES["slerp"](case.deltas, weights))
