"""Default weights and the weighted sum, which the methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.merging.method import mean

if TYPE_CHECKING:
    from torch import Tensor


def ones(count: int, given: Sequence[float] | None) -> list[float]:
    """Return the given weights, or 1 each.

    >>> ones(2, None)
    [1.0, 1.0]
    """
    return [1.0] * count if given is None else list(given)


def ratios(count: int, given: Sequence[float] | None) -> list[float]:
    """Return the given weights, or 1/N each, for methods that use only ratios; refuse negative weights and all 0.

    >>> ratios(2, [3, 1])
    [3, 1]
    """
    weights = mean(count, given)
    if min(weights) < 0 or not any(weights):
        raise PimergeError(
            f"the weights are {', '.join(f'{weight:g}' for weight in weights)}",
            "expected none below 0 and at least one above 0, because only their ratios count",
        )
    return weights


def unchanged(weights: Tensor) -> Tensor:
    """Return the weights, as the coefficients of a plain weighted sum: (experts) → (experts)."""
    return weights


def weighted_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """Compute Σ w_n ΔW_n in the dtype of the updates: (experts, *shape), (experts) → (*shape).

    >>> import torch
    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, -6.0]]), torch.tensor([2.0, -0.5]))
    tensor([0.5000, 7.0000])
    """
    import torch

    total: Tensor = torch.tensordot(weights.to(deltas), deltas, dims=1)
    return total
