"""Trim, elect signs, and average the entries that agree (TIES, arXiv 2306.01708, section 3).

1. Each expert keeps a share ``density`` of the entries of a tensor, the largest.
2. Per entry, the sign of Σ w_n t_n is elected; + if the sum is 0.
3. Per entry, ΔW = scale · Σ w_n t_n / Σ |w_n| over the experts that have the elected sign.

The paper trims over all parameters of a model, whereas here each tensor is trimmed separately. The w_n are not in the
paper. Because of the mean, only their ratios matter, so two equal experts at 0.5 each give the trimmed expert. A
negative weight negates the expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._trim import BREAKS, elected_mean, trim

if TYPE_CHECKING:
    from torch import Tensor


def merge(deltas: Tensor, weights: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim, elect and average: (experts, *shape), (experts) → (*shape).

    >>> import torch
    >>> deltas = torch.tensor([[4.0, 1.0, -3.0, 0.5], [2.0, -5.0, 0.1, 0.2]])
    >>> merge(deltas, torch.tensor([0.5, 0.5]), density=0.5)
    tensor([ 3., -5., -3.,  0.])
    """
    return scale * elected_mean(trim(deltas, density), weights)


METHOD = MergeMethod(
    name="ties",
    summary="Trim each update, elect signs, and average the entries that agree.",
    formula="ΔW = scale · elected_mean(t_n), t_n = the largest entries of ΔW_n",
    paper="TIES, arXiv 2306.01708, section 3",
    space=Space.ELEMENTWISE,
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, DENSITY, SCALE),
)
