"""The scaled sum of the updates: ΔW = λ Σ w_n ΔW_n (task arithmetic, arXiv 2212.04089, section 2).

λ is the option ``scale``, which the paper chooses on held-out data. The w_n are not in the paper, and are 1 by default.
A negative weight removes the task of an expert, as in the paper's negation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, options_of
from pimerge.merging.methods._weights import ones

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(weights: Tensor, *, scale: float = 1.0) -> Tensor:
    """Compute λ w_n: (experts) → (experts).

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
