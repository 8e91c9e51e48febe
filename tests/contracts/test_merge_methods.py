"""The laws that every merge method keeps, whatever it does."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType

import pytest
import torch

from pimerge import strategies
from pimerge.errors import PimergeError
from tests.raw import normal

F64 = torch.float64


@pytest.fixture(params=list(strategies.summaries("merge_methods")))
def method(request: pytest.FixtureRequest) -> ModuleType:
    """Each file of the folder."""
    return strategies.load("merge_methods", request.param)


def deltas(count: int = 3) -> torch.Tensor:
    """Updates of one module: (count, 4, 5)."""
    return normal(count, 4, 5).to(F64)


WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)


def test_it_says_in_which_space_it_works(method: ModuleType) -> None:
    assert method.SPACE in ("linear", "spectral", "elementwise")


def test_it_accepts_given_weights_or_none_and_has_one_finite_number_per_expert(method: ModuleType) -> None:
    accepted = []
    for given in (None, [0.2, 0.8, 0.5]):
        with suppress(PimergeError):
            accepted.append(method.weights(3, given))
    assert accepted
    assert all(len(weights) == 3 and torch.tensor(weights).isfinite().all() for weights in accepted)


def test_the_result_has_the_shape_and_dtype_of_one_update(method: ModuleType) -> None:
    result = method.merge(deltas(), WEIGHTS)
    assert (result.shape, result.dtype) == ((4, 5), F64)
    assert result.isfinite().all()


def test_the_inputs_stay_as_they_were_and_the_result_is_the_same_twice(method: ModuleType) -> None:
    given, weights = deltas(), WEIGHTS.clone()
    first, second = method.merge(given, weights), method.merge(given, weights)
    assert torch.equal(given, deltas())
    assert torch.equal(weights, WEIGHTS)
    assert torch.equal(first, second)


def test_one_expert_at_weight_one_comes_back(method: ModuleType) -> None:
    torch.testing.assert_close(method.merge(deltas(1), torch.ones(1, dtype=F64)), deltas(1)[0], rtol=0, atol=1e-14)


def test_copies_with_weights_of_sum_one_give_the_expert(method: ModuleType) -> None:
    copies = deltas(1).expand(3, 4, 5)
    torch.testing.assert_close(method.merge(copies, WEIGHTS), deltas(1)[0], rtol=0, atol=1e-13)


def test_zero_updates_give_zero(method: ModuleType) -> None:
    assert torch.equal(method.merge(torch.zeros(3, 4, 5, dtype=F64), WEIGHTS), torch.zeros(4, 5, dtype=F64))


def test_the_order_of_the_experts_does_not_matter(method: ModuleType) -> None:
    order = [2, 0, 1]
    expected = method.merge(deltas(), WEIGHTS)
    torch.testing.assert_close(method.merge(deltas()[order], WEIGHTS[order]), expected, rtol=0, atol=1e-13)


def test_what_is_not_elementwise_commutes_with_rotations(method: ModuleType) -> None:
    if method.SPACE == "elementwise":
        pytest.skip("the basis matters to it")
    left = torch.linalg.qr(normal(6, 4, seed=1).to(F64))[0]
    right = torch.linalg.qr(normal(7, 5, seed=2).to(F64))[0]
    rotated = method.merge(left @ deltas() @ right.T, WEIGHTS)
    torch.testing.assert_close(rotated, left @ method.merge(deltas(), WEIGHTS) @ right.T, rtol=0, atol=1e-13)


def test_what_is_linear_is_the_weighted_sum(method: ModuleType) -> None:
    if method.SPACE != "linear":
        pytest.skip("it is not linear")
    expected = sum(float(weight) * delta for weight, delta in zip(WEIGHTS, deltas(), strict=True))
    torch.testing.assert_close(method.merge(deltas(), WEIGHTS), expected, rtol=0, atol=1e-14)
