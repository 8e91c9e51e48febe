"""Another method on the cores in the bases that the experts' factors share (Core Space, arXiv 2509.17786).

With the reference bases U_B, of the left singular vectors of [B_1 … B_N], and V_A, of the right ones of the
stacked A_n, the cores M_n = U_BᵀΔW_nV_A are merged by ``inner_method`` and mapped back: ΔW = scale · U_B M V_Aᵀ.
``ties`` trims each core to its ``density`` largest entries; for the others density does not count. The weights
are 1/N by default, also for ``tsv`` and ``iso-c``, where the papers have 1: scale N gives theirs.
"""

from __future__ import annotations

from torch import Tensor

from pimerge.core.errors import PimergeError, nearest
from pimerge.merging.methods import _trim, iso_c, ties, tsv
from pimerge.merging.methods._linear import weighted_sum
from pimerge.merging.methods._weights import mean as weights

__all__ = ["BREAKS", "NEEDS", "SPACE", "merge", "weights"]

SPACE = "reference"
NEEDS = ("limit",)
BREAKS = {
    **_trim.BREAKS,
    "gauge": "an inner method that looks at entries sees the bases, which depend on how ΔW is split into B and A",
}
INNER = ("ties", "linear", "tsv", "iso-c")


def merge(
    deltas: Tensor,
    weights: Tensor,
    *,
    limit: int,
    inner_method: str = "ties",
    density: float = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """The merged core: (experts, R, R'), (experts) → (R, R').

    Args:
        limit: min(d_out, d_in), for ``tsv``.

    Raises:
        PimergeError: for an unknown inner method, or unless 0 < density ≤ 1.

    >>> import torch
    >>> merge(torch.tensor([[[1.0, -3.0]], [[2.0, 0.5]]]), torch.tensor([0.5, 0.5]), limit=2, density=0.5)
    tensor([[ 2., -3.]])
    """
    match inner_method:
        case "ties":
            merged = ties.merge(deltas, weights, density=density)
        case "linear":
            merged = weighted_sum(deltas, weights)
        case "tsv":
            merged = tsv.merge(deltas, weights, limit=limit)
        case "iso-c":
            merged = iso_c.merge(deltas, weights)
        case _:
            raise PimergeError(f"--inner is '{inner_method}'", nearest(inner_method, INNER))
    return scale * merged
