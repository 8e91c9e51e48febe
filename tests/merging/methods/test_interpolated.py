"""The weighted sum."""

from __future__ import annotations

import pytest
import torch

from pimerge.core.errors import PimergeError
from pimerge.merging.methods import interpolated


def test_the_weights_stay_as_given() -> None:
    assert interpolated.weights(3, [2.0, -1.0, 0.0]) == [2.0, -1.0, 0.0]


def test_no_weights_are_refused() -> None:
    with pytest.raises(PimergeError, match=r"needs weights\n.*pimerge rank"):
        interpolated.weights(2, None)


def test_the_coefficients_are_the_weights() -> None:
    assert interpolated.METHOD.function(torch.tensor([2.0, -0.5])).tolist() == [2.0, -0.5]
