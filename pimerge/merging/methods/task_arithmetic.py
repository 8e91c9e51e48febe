"""The scaled sum of the updates: ΔW = λ Σ w_n ΔW_n (task arithmetic, arXiv 2212.04089, section 2).

λ is the option ``scale``; the paper chooses it on held-out data and has no w_n, which are 1 by default. A
negative weight takes an expert's task away, the paper's negation.
"""

from __future__ import annotations

from torch import Tensor

from pimerge.merging.methods._weights import ones as weights

__all__ = ["SPACE", "coefficients", "weights"]

SPACE = "linear"


def coefficients(weights: Tensor, *, scale: float = 1.0) -> Tensor:
    """λ w_n: (experts) → (experts).

    >>> import torch
    >>> coefficients(torch.tensor([1.0, -0.5]), scale=2.0)
    tensor([ 2., -1.])
    """
    return scale * weights
