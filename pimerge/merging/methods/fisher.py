"""The mean of the parameters by their Fisher: θ = Σ λ_n F_n θ_n / Σ λ_n F_n (arXiv 2111.09832, eq. 4).

F_n is the diagonal Fisher of expert n, raised to at least ``floor``, which keeps an entry that no expert's data
touch at the weighted mean. The λ_n are the weights, of which only the ratios count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.merging.methods._linear import weighted_sum
from pimerge.merging.methods._weights import shares as weights

__all__ = ["BREAKS", "NEEDS", "SPACE", "merge", "weights"]

SPACE = "factors"
JOINS_TARGET = True
NEEDS = ("fishers",)
BREAKS = {"gauge": "the Fisher is that of single entries of A and B, whatever basis they are in"}


def merge(deltas: Tensor, weights: Tensor, *, fishers: Tensor, floor: float = 1e-6) -> Tensor:
    """The weighted mean per entry: (experts, *shape), (experts) → (*shape).

    Args:
        deltas: the parameters themselves.
        fishers: their diagonal Fisher, (experts, *shape).

    Raises:
        PimergeError: if the floor is below 0.

    >>> parameters, fishers = torch.tensor([[4.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> merge(parameters, torch.tensor([0.5, 0.5]), fishers=fishers)
    tensor([3., 2.])
    """
    if floor < 0:
        raise PimergeError(f"--floor is {floor:g}", "expected 0 or more")
    shares = weights.to(deltas) / weights.to(deltas).sum()
    raised = fishers.to(deltas).clamp(min=floor)
    total = weighted_sum(raised, shares)
    return torch.where(total > 0, weighted_sum(raised * deltas, shares) / total, weighted_sum(deltas, shares))
