"""The scaled sum."""

from __future__ import annotations

import torch

from pimerge.merging.methods import task_arithmetic


def test_each_expert_counts_fully_by_default() -> None:
    assert task_arithmetic.METHOD.weights(2, None) == [1.0, 1.0]
    assert task_arithmetic.METHOD.weights(2, [0.5, -1.0]) == [0.5, -1.0]


def test_the_coefficients_are_the_scaled_weights() -> None:
    assert task_arithmetic.coefficients(torch.tensor([1.0, -2.0]), scale=0.5).tolist() == [0.5, -1.0]
