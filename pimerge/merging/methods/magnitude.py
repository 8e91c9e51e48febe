"""The weighted sum of the largest entries of each update (magnitude pruning, arXiv 1506.02626).

ΔW = scale · Σ w_n t_n, where t_n keeps the ``density`` largest entries of a tensor. Nothing makes up for what
was trimmed.
"""

from __future__ import annotations

from torch import Tensor

from pimerge.merging.methods._linear import weighted_sum
from pimerge.merging.methods._trim import BREAKS, trim
from pimerge.merging.methods._weights import mean as weights

__all__ = ["BREAKS", "SPACE", "merge", "weights"]

SPACE = "elementwise"


def merge(deltas: Tensor, weights: Tensor, *, density: float = 0.5, scale: float = 1.0) -> Tensor:
    """Trim and add: (experts, *shape), (experts) → (*shape).

    Raises:
        PimergeError: unless 0 < density ≤ 1.

    >>> import torch
    >>> merge(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), torch.tensor([0.5, 0.5]))
    tensor([ 1.0000, -1.5000])
    """
    return scale * weighted_sum(trim(deltas, density), weights)
