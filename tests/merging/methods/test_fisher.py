"""The mean by the Fisher."""

from __future__ import annotations

import pytest
import torch

from pimerge.core.errors import PimergeError
from pimerge.merging.methods import fisher
from tests.support.merge_cases import F64, close, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal


def test_the_numbers_by_hand() -> None:
    parameters = torch.tensor([[4.0, 1.0], [0.0, 3.0]], dtype=F64)
    fishers = torch.tensor([[3.0, 0.0], [1.0, 5.0]], dtype=F64)
    found = fisher.merge(parameters, torch.tensor([0.5, 0.5], dtype=F64), fishers=fishers, floor=0.0)
    assert found.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_where_no_data_reach_it_is_the_weighted_mean(floor: float) -> None:
    parameters, fishers = torch.tensor([[4.0], [0.0]], dtype=F64), torch.zeros(2, 1, dtype=F64)
    found = fisher.merge(parameters, torch.tensor([3.0, 1.0], dtype=F64), fishers=fishers, floor=floor)
    assert found.tolist() == [3.0]


def test_what_is_no_mean_is_refused() -> None:
    for given in ([1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(PimergeError, match="the weights are"):
            fisher.METHOD.weights(2, given)


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.5])
def test_it_is_the_reference(floor: float) -> None:
    parameters, fishers, weights = normal(3, 4, 5).to(F64), normal(3, 4, 5, seed=1).to(F64).square(), weights_of(3)
    found = fisher.merge(parameters, weights, fishers=fishers, floor=floor)
    close(found, REFERENCES["fisher"](parameters, weights, fishers=fishers, floor=floor))
