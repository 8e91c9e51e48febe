"""Trimming: an update keeps its largest entries.

The number of entries kept is exact, since equal magnitudes at the threshold are common in bfloat16 and keeping
all of them would change the result; among equal ones the first in row-major order stay. numpy's selection and
comparisons are several times faster than torch's on a CPU, where merging happens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pimerge.merging.methods._checks import check_share

BREAKS = {
    "identity": "the smallest entries are trimmed; it holds at --density 1",
    "copies": "the smallest entries are trimmed; it holds at --density 1",
}


def kept_count(density: float, size: int) -> int:
    """How many of ``size`` entries a share keeps: rounded down, at least one.

    >>> kept_count(0.2, 9), kept_count(0.2, 1)
    (1, 1)
    """
    return max(1, int(density * size))


def largest(delta: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` entries of largest magnitude: (*shape) → bool (*shape).

    >>> largest(torch.tensor([[1.0, -3.0], [3.0, 3.0]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    magnitude = np.abs(delta.numpy()).ravel()
    threshold = np.partition(magnitude, -count)[-count]
    mask = magnitude >= threshold
    surplus = np.count_nonzero(mask) - count
    if surplus:
        mask[np.flatnonzero(magnitude == threshold)[-surplus:]] = False
    return torch.from_numpy(mask).view(delta.shape)


def trim(deltas: Tensor, density: float) -> Tensor:
    """The largest entries of each expert, 0 elsewhere: (experts, *shape) → (experts, *shape).

    Raises:
        PimergeError: unless 0 < density ≤ 1.

    >>> trim(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), density=0.5)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    check_share("--density", density)
    trimmed = torch.empty_like(deltas)
    for delta, out in zip(deltas, trimmed, strict=True):
        np.multiply(delta.numpy(), largest(delta, kept_count(density, delta.numel())).numpy(), out=out.numpy())
    return trimmed
