"""The sum of the updates with all singular values equal: ΔW = σ̄ UVᵀ (Iso-C, arXiv 2502.04959, section 4.1).

With Σ w_n ΔW_n = U diag(σ) Vᵀ, ΔW = scale · σ̄ UVᵀ, where σ̄ is the mean of σ. The w_n are not in the paper, and are 1
by default. The paper's matrices have full rank. A sum of low-rank updates has null directions, which are arbitrary, so
they are left out of the mean and of UVᵀ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, options_of
from pimerge.merging.methods._spectrum import STORED, svd
from pimerge.merging.methods._weights import ones, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def merge(deltas: Tensor, weights: Tensor, *, scale: float = 1.0) -> Tensor:
    """Add and flatten the spectrum: (experts, R, R'), (experts) → (R, R').

    >>> import torch
    >>> merge(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.ones(1))
    tensor([[2., 0.],
            [0., 2.]])
    """
    U, S, Vh = svd(weighted_sum(deltas, weights), null=STORED)
    return (scale * S.mean() * U) @ Vh


METHOD = MergeMethod(
    name="iso-c",
    summary="The sum of the updates with all singular values made equal.",
    formula="ΔW = scale · σ̄ UVᵀ, with Σ w_n ΔW_n = U diag(σ) Vᵀ",
    paper="Iso-C, arXiv 2502.04959, section 4.1",
    space=Space.SPECTRAL,
    breaks=dict.fromkeys(("identity", "copies"), "the singular values become equal"),
    weights=ones,
    merge=merge,
    options=options_of(merge, SCALE),
)
