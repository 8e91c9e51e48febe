"""The mean."""

from __future__ import annotations

import pytest
import torch

from pimerge.errors import PimergeError
from pimerge.merge_methods import uniform


def test_each_expert_weighs_one_nth() -> None:
    assert uniform.weights(3, None) == [1 / 3] * 3


def test_given_weights_are_refused() -> None:
    with pytest.raises(PimergeError, match=r"'uniform' takes no weights\n.*interpolated"):
        uniform.weights(2, [0.5, 0.5])


def test_it_is_the_mean() -> None:
    deltas = torch.tensor([[[1.0, 2.0]], [[3.0, -6.0]]])
    assert uniform.merge(deltas, torch.tensor(uniform.weights(2, None))).tolist() == [[2.0, -2.0]]
