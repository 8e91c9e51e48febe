"""Merge cores in reference bases of the experts' factors with another method (Core Space, arXiv 2509.17786).

The reference bases are U_B, the left singular vectors of [B_1 … B_N], and V_A, the right singular vectors of the
stacked A_n. The cores M_n = U_BᵀΔW_nV_A are merged by ``inner_method`` and mapped back: ΔW = scale · U_B M V_Aᵀ. Only
``ties`` uses ``density``, to trim each core. The weights are 1/N by default, also for ``tsv`` and ``iso-c``, where the
papers use 1; scale N gives their results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods import _trim, iso_c, ties, tsv
from pimerge.merging.methods._options import DENSITY, INNER, SCALE, InnerMethod, options_of
from pimerge.merging.methods._weights import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def merge(
    deltas: Tensor,
    weights: Tensor,
    *,
    limit: int,
    inner_method: InnerMethod = InnerMethod.TIES,
    density: float = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """Merge the cores: (experts, R, R'), (experts) → (R, R').

    Args:
        limit: min(d_out, d_in), for ``tsv``.

    >>> import torch
    >>> merge(torch.tensor([[[1.0, -3.0]], [[2.0, 0.5]]]), torch.tensor([0.5, 0.5]), limit=2, density=0.5)
    tensor([[ 2., -3.]])
    """
    match inner_method:
        case InnerMethod.TIES:
            merged = ties.merge(deltas, weights, density=density)
        case InnerMethod.LINEAR:
            merged = weighted_sum(deltas, weights)
        case InnerMethod.TSV:
            merged = tsv.merge(deltas, weights, limit=limit)
        case InnerMethod.ISO_C:
            merged = iso_c.merge(deltas, weights)
    return scale * merged


METHOD = MergeMethod(
    name="core-space",
    summary="Merge the cores in reference bases of the experts' factors with another method.",
    formula="ΔW = scale · U_B merge(U_BᵀΔW_nV_A) V_Aᵀ",
    paper="Core Space, arXiv 2509.17786",
    space=Space.REFERENCE,
    needs=("limit",),
    breaks={
        **_trim.BREAKS,
        "gauge": "an inner method that looks at entries sees the bases, which depend on how ΔW is split into B and A",
    },
    merge=merge,
    options=options_of(merge, INNER, DENSITY, SCALE),
)
