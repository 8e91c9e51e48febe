"""The mean."""

from __future__ import annotations

import pytest
import torch

from pimerge.core.errors import PimergeError
from pimerge.merging.methods import uniform


def test_each_expert_weighs_one_nth() -> None:
    assert uniform.weights(3, None) == [1 / 3] * 3


def test_given_weights_are_refused() -> None:
    with pytest.raises(PimergeError, match=r"'uniform' takes no weights\n.*interpolated"):
        uniform.weights(2, [0.5, 0.5])


def test_the_coefficients_are_the_weights() -> None:
    assert uniform.METHOD.function(torch.tensor(uniform.weights(2, None))).tolist() == [0.5, 0.5]
