"""Updates aligned by one singular value decomposition, then merged (KnOTS, arXiv 2410.19735, section 4).

[ΔW_1 … ΔW_N] = UΣ[V_1ᵀ … V_Nᵀ], the V_nᵀ are merged by ``inner_method``, and ΔW = scale · UΣV_mergedᵀ. ``ties``
trims each V_nᵀ to its ``density`` largest entries; ``linear`` is the weighted sum of the updates, and density
does not count. Null directions of the concatenation are arbitrary and are left out, and so are entries of the
V_n (whose rows are of unit length together) below 1e-10: rounding has no sign to elect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pimerge.core.errors import PimergeError, nearest
from pimerge.merging.methods import ties
from pimerge.merging.methods._linear import weighted_sum
from pimerge.merging.methods._spectrum import STORED, svd
from pimerge.merging.methods._trim import BREAKS
from pimerge.merging.methods._weights import mean as weights

__all__ = ["BREAKS", "SPACE", "merge", "weights"]

SPACE = "rows"
INNER = ("ties", "linear")
ROUNDING = 1e-10


def merge(
    deltas: Tensor, weights: Tensor, *, inner_method: str = "ties", density: float = 0.2, scale: float = 1.0
) -> Tensor:
    """Align, merge and map back: (experts, R, d_in), (experts) → (R, d_in).

    Raises:
        PimergeError: for an unknown inner method, or unless 0 < density ≤ 1.

    >>> deltas = torch.tensor([[[1.0, -3.0]], [[2.0, 1.0]]])
    >>> merge(deltas, torch.tensor([0.5, 0.5]), density=0.5)
    tensor([[ 2.0000, -3.0000]])
    """
    if inner_method not in INNER:
        raise PimergeError(f"--inner is '{inner_method}'", nearest(inner_method, INNER))
    # the triangle of the tall [ΔW_1 … ΔW_N]ᵀ has its U and Σ, and the V_n follow without forming V
    triangle = torch.linalg.qr(deltas.mT.flatten(0, 1), mode="r").R
    U, S, _ = svd(triangle.mT, null=STORED)
    if not len(S):
        return torch.zeros_like(deltas[0])
    aligned = (U.mT / S[:, None]) @ deltas
    aligned *= aligned.abs() > ROUNDING
    merged = ties.merge(aligned, weights, density=density) if inner_method == "ties" else weighted_sum(aligned, weights)
    return (scale * U * S) @ merged
