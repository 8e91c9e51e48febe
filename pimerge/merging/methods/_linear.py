"""The weighted sum, shared by the methods that end in one."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ w_n ΔW_n in the dtype of the updates: (experts, *shape), (experts) → (*shape).

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, -6.0]]), torch.tensor([2.0, -0.5]))
    tensor([0.5000, 7.0000])
    """
    total: Tensor = torch.tensordot(weights.to(deltas), deltas, dims=1)
    return total
