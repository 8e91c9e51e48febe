"""The weighted sum of the largest entries of each update (magnitude pruning, arXiv 1506.02626).

ΔW = scale · Σ w_n t_n, where t_n keeps a share ``density`` of the entries of a tensor, the largest. The result is not
rescaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._trim import BREAKS, trim
from pimerge.merging.methods._weights import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def merge(deltas: Tensor, weights: Tensor, *, density: float = 0.5, scale: float = 1.0) -> Tensor:
    """Trim and add: (experts, *shape), (experts) → (*shape).

    >>> import torch
    >>> merge(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), torch.tensor([0.5, 0.5]))
    tensor([ 1.0000, -1.5000])
    """
    return scale * weighted_sum(trim(deltas, density), weights)


METHOD = MergeMethod(
    name="magnitude",
    summary="The weighted sum of the largest entries of each update.",
    formula="ΔW = scale · Σ w_n t_n, t_n = the largest entries of ΔW_n",
    paper="magnitude pruning, arXiv 1506.02626",
    space=Space.ELEMENTWISE,
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, DENSITY, SCALE),
)
