"""Drop entries at random, elect signs, and average (DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708).

Entries are dropped and rescaled as in ``dare-linear``. Then follow the second and third step of ``ties``, without
trimming. As in ``ties``, only the ratios of the weights matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._drop import BREAKS, drop
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._trim import elected_mean

if TYPE_CHECKING:
    from torch import Generator, Tensor


def merge(
    deltas: Tensor, weights: Tensor, *, generators: Sequence[Generator], density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """Drop, rescale, elect and average: (experts, *shape), (experts) → (*shape).

    Args:
        generators: one per expert, on the CPU.

    >>> import torch
    >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    >>> merge(torch.tensor([[4.0, -1.0], [2.0, 3.0]]), torch.ones(2), generators=generators, density=1.0)
    tensor([3., 3.])
    """
    return scale * elected_mean(drop(deltas, density, generators), weights)


METHOD = MergeMethod(
    name="dare-ties",
    summary="Drop entries at random, elect signs, and average the entries that agree.",
    formula="ΔW = scale · elected_mean(m_n ⊙ ΔW_n / density), with random masks m_n",
    paper="DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708",
    space=Space.ELEMENTWISE,
    needs=("generators",),
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, DENSITY, SCALE),
)
