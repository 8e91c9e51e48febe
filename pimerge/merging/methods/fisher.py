"""The Fisher-weighted mean of the parameters: θ = Σ λ_n F_n θ_n / Σ λ_n F_n (arXiv 2111.09832, eq. 4).

F_n is the diagonal Fisher of expert n, with a lower bound ``floor``, so that an entry without Fisher information gets
the weighted mean. The λ_n are the weights. Only their ratios count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import options_of
from pimerge.merging.methods._weights import ratios, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = Option("floor", float, "Lower bound on the Fisher information.", lambda floor: floor >= 0, "at least 0")


def merge(deltas: Tensor, weights: Tensor, *, fishers: Tensor, floor: float = 1e-6) -> Tensor:
    """Average per entry: (experts, *shape), (experts) → (*shape).

    Args:
        deltas: the parameters of the experts.
        fishers: their diagonal Fisher, (experts, *shape).

    >>> import torch
    >>> parameters, fishers = torch.tensor([[4.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> merge(parameters, torch.tensor([0.5, 0.5]), fishers=fishers)
    tensor([3., 2.])
    """
    import torch

    shares = weights.to(deltas) / weights.to(deltas).sum()
    raised = fishers.to(deltas).clamp(min=floor)
    total = weighted_sum(raised, shares)
    return torch.where(total > 0, weighted_sum(raised * deltas, shares) / total, weighted_sum(deltas, shares))


METHOD = MergeMethod(
    name="fisher",
    summary="The mean of the parameters, each weighted by its Fisher information.",
    formula="θ = Σ w_n F_n θ_n / Σ w_n F_n",
    paper="Fisher merging, arXiv 2111.09832, eq. 4",
    space=Space.FACTORS,
    needs=("fishers",),
    breaks={"gauge": "the Fisher is per entry of A and B, so it depends on their basis"},
    joins_target=True,
    averages=True,
    weights=ratios,
    merge=merge,
    options=options_of(merge, FLOOR),
)
