"""The weighted sum without the largest and the smallest entries (Model Breadcrumbs, arXiv 2312.06795, section 3).

ΔW = scale · Σ w_n t_n. From each tensor, t_n drops a share ``gamma`` of the largest entries, and then the smallest, so
that a share ``density`` remains. The paper's β is 1 − density − gamma. If density + gamma is above 1, fewer of the
largest entries are dropped. At least one entry remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._trim import BREAKS, kept_count, largest
from pimerge.merging.methods._weights import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

GAMMA = Option(
    "gamma", float, "Share of entries dropped as the largest.", lambda gamma: 0 <= gamma < 1, "at least 0 and below 1"
)


def merge(deltas: Tensor, weights: Tensor, *, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0) -> Tensor:
    """Drop the largest and smallest entries, and add: (experts, *shape), (experts) → (*shape).

    >>> import torch
    >>> merge(torch.tensor([[1.0, -3.0, 2.0, 9.0]]), torch.tensor([1.0]), density=0.5, gamma=0.25)
    tensor([ 0., -3.,  2.,  0.])
    """
    import torch

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


METHOD = MergeMethod(
    name="breadcrumbs",
    summary="The weighted sum without the largest and the smallest entries of each update.",
    formula="ΔW = scale · Σ w_n t_n, t_n = the middle entries of ΔW_n",
    paper="Model Breadcrumbs, arXiv 2312.06795, section 3",
    space=Space.ELEMENTWISE,
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, DENSITY, GAMMA, SCALE),
)
