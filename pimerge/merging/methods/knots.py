"""Updates aligned by one singular value decomposition, then merged (KnOTS, arXiv 2410.19735, section 4).

With [ΔW_1 … ΔW_N] = UΣ[V_1ᵀ … V_Nᵀ], the V_nᵀ are merged by ``inner_method``, and ΔW = scale · UΣV_mergedᵀ. ``ties``
uses ``density`` to trim each V_nᵀ. ``linear`` is the weighted sum of the updates and does not use it. Null directions
of the concatenation are arbitrary and are left out. Entries of V_n below 1e-10 are rounding errors without a meaningful
sign, and are set to 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods import ties
from pimerge.merging.methods._options import DENSITY, INNER, SCALE, InnerMethod, options_of
from pimerge.merging.methods._spectrum import STORED, svd
from pimerge.merging.methods._trim import BREAKS
from pimerge.merging.methods._weights import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

INNER_OF_ROWS = replace(INNER, accepts=lambda inner: inner in (InnerMethod.TIES, InnerMethod.LINEAR))
ROUNDING = 1e-10


def merge(
    deltas: Tensor,
    weights: Tensor,
    *,
    inner_method: InnerMethod = InnerMethod.TIES,
    density: float = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """Align, merge and map back: (experts, R, d_in), (experts) → (R, d_in).

    >>> import torch
    >>> deltas = torch.tensor([[[1.0, -3.0]], [[2.0, 1.0]]])
    >>> merge(deltas, torch.tensor([0.5, 0.5]), density=0.5)
    tensor([[ 2.0000, -3.0000]])
    """
    import torch

    # the triangular factor of [ΔW_1 … ΔW_N]ᵀ gives U and Σ, and then each V_n, without forming V
    triangle = torch.linalg.qr(deltas.mT.flatten(0, 1), mode="r").R
    U, S, _ = svd(triangle.mT, null=STORED)
    if not len(S):
        return torch.zeros_like(deltas[0])
    aligned = (U.mT / S[:, None]) @ deltas
    aligned *= aligned.abs() > ROUNDING
    if inner_method == InnerMethod.TIES:
        return (scale * U * S) @ ties.merge(aligned, weights, density=density)
    return (scale * U * S) @ weighted_sum(aligned, weights)


METHOD = MergeMethod(
    name="knots",
    summary="Updates aligned by one singular value decomposition, then merged by another method.",
    formula="ΔW = scale · UΣ merge(V_nᵀ), with [ΔW_1 … ΔW_N] = UΣ[V_1ᵀ … V_Nᵀ]",
    paper="KnOTS, arXiv 2410.19735, section 4",
    space=Space.ROWS,
    breaks=BREAKS,
    merge=merge,
    options=options_of(merge, INNER_OF_ROWS, DENSITY, SCALE),
)
