"""The weighted sum without the largest and the smallest entries (Model Breadcrumbs, arXiv 2312.06795, section 3).

ΔW = scale · Σ w_n t_n, where t_n lacks the ``gamma`` share of the largest entries of a tensor, and so many of
the smallest that the ``density`` share remains; the paper's β is 1 − density − gamma. Where density + gamma
is above 1, fewer of the largest are dropped, and at least one entry remains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.merging.methods._checks import check_share
from pimerge.merging.methods._linear import weighted_sum
from pimerge.merging.methods._trim import BREAKS, kept_count, largest
from pimerge.merging.methods._weights import mean as weights

__all__ = ["BREAKS", "SPACE", "merge", "weights"]

SPACE = "elementwise"


def merge(deltas: Tensor, weights: Tensor, *, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0) -> Tensor:
    """Drop both ends and add: (experts, *shape), (experts) → (*shape).

    Raises:
        PimergeError: unless 0 < density ≤ 1 and 0 ≤ gamma < 1.

    >>> merge(torch.tensor([[1.0, -3.0, 2.0, 9.0]]), torch.tensor([1.0]), density=0.5, gamma=0.25)
    tensor([ 0., -3.,  2.,  0.])
    """
    check_share("--density", density)
    if not 0 <= gamma < 1:
        raise PimergeError(f"--gamma is {gamma:g}", "expected a share from 0 to below 1")
    size = deltas[0].numel()
    kept = kept_count(density, size)
    outliers = min(int(gamma * size), size - kept)
    crumbs = torch.stack([_without_ends(delta, outliers, kept) for delta in deltas])
    return scale * weighted_sum(crumbs, weights)


def _without_ends(delta: Tensor, outliers: int, kept: int) -> Tensor:
    mask = largest(delta, outliers + kept)
    if outliers:
        mask &= ~largest(delta, outliers)
    return delta.where(mask, 0)
