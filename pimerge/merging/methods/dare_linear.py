"""The weighted sum after random dropping: Σ w_n m_n ⊙ ΔW_n / p (DARE, arXiv 2311.03099, section 3).

Each entry of each update is kept with probability p = ``density`` and divided by p, so that the expectation is
scale · Σ w_n ΔW_n. The paper's drop rate is 1 − p. In fact, p is rounded to a multiple of 1/65536.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._drop import BREAKS, drop
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._weights import weighted_sum

if TYPE_CHECKING:
    from torch import Generator, Tensor


def merge(
    deltas: Tensor, weights: Tensor, *, generators: Sequence[Generator], density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """Drop, rescale and add: (experts, *shape), (experts) → (*shape).

    Args:
        generators: one per expert, on the CPU.

    >>> import torch
    >>> merge(torch.ones(1, 8), torch.ones(1), generators=[torch.Generator().manual_seed(0)], density=0.25).unique()
    tensor([0., 4.])
    """
    return scale * weighted_sum(drop(deltas, density, generators), weights)


METHOD = MergeMethod(
    name="dare-linear",
    summary="The weighted sum after entries of each update are dropped at random.",
    formula="ΔW = scale · Σ w_n m_n ⊙ ΔW_n / density, with random masks m_n",
    paper="DARE, arXiv 2311.03099, section 3",
    space=Space.ELEMENTWISE,
    needs=("generators",),
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, DENSITY, SCALE),
)
