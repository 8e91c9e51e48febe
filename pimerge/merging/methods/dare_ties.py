"""Random dropping, then sign election and mean of what agrees (DARE, arXiv 2311.03099, with TIES, 2306.01708).

The drop and rescale of ``dare-linear``, then the second and third step of ``ties``; nothing is trimmed. As in
``ties``, only the ratios of the weights matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from pimerge.merging.methods._drop import BREAKS, drop
from pimerge.merging.methods._elect import elected_mean
from pimerge.merging.methods._weights import mean as weights

__all__ = ["BREAKS", "NEEDS", "SPACE", "merge", "weights"]

SPACE = "elementwise"
NEEDS = ("generators",)


def merge(
    deltas: Tensor, weights: Tensor, *, generators: Sequence[Generator], density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """Drop, rescale, elect and average: (experts, *shape), (experts) → (*shape).

    Args:
        generators: one per expert, on the CPU.

    Raises:
        PimergeError: unless 0 < density ≤ 1.

    >>> import torch
    >>> generators = [Generator().manual_seed(seed) for seed in (0, 1)]
    >>> merge(torch.tensor([[4.0, -1.0], [2.0, 3.0]]), torch.ones(2), generators=generators, density=1.0)
    tensor([3., 3.])
    """
    return scale * elected_mean(drop(deltas, density, generators), weights)
