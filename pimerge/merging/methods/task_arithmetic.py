"""The scaled sum of the updates: ΔW = λ Σ w_n ΔW_n (task arithmetic, arXiv 2212.04089, section 2).

λ is the option ``scale``; the paper chooses it on held-out data and has no w_n, which are 1 by default. A
negative weight takes an expert's task away, the paper's negation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, options_of
from pimerge.merging.methods._weights import ones

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(weights: Tensor, *, scale: float = 1.0) -> Tensor:
    """λ w_n: (experts) → (experts).

    >>> import torch
    >>> coefficients(torch.tensor([1.0, -0.5]), scale=2.0)
    tensor([ 2., -1.])
    """
    return scale * weights


METHOD = MergeMethod(
    name="task-arithmetic",
    summary="The scaled sum of the updates.",
    formula="ΔW = scale · Σ w_n ΔW_n",
    paper="task arithmetic, arXiv 2212.04089, section 2",
    space=Space.LINEAR,
    weights=ones,
    coefficients=coefficients,
    options=options_of(coefficients, SCALE),
)
