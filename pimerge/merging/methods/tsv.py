"""The sum of decorrelated leading singular triples of the updates (TSV-Merge, arXiv 2412.00081, section 4).

With ΔW_n ≈ U_n Σ_n V_nᵀ, the k = limit // N leading triples of each expert (at least 1), the concatenations
U = [U_1 … U_N] and V = [V_1 … V_N] are replaced by the nearest matrices with orthonormal columns, U_⊥ = PQᵀ of
U = PDQᵀ, and ΔW = scale · Σ_n U_⊥n diag(w_n σ_n) V_⊥nᵀ. The w_n are not in the paper, and are 1 by default. The null
directions of low-rank updates are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, options_of
from pimerge.merging.methods._spectrum import svd, whiten
from pimerge.merging.methods._weights import ones

if TYPE_CHECKING:
    from torch import Tensor


def merge(deltas: Tensor, weights: Tensor, *, limit: int, scale: float = 1.0) -> Tensor:
    """Concatenate, whiten and sum: (experts, R, R'), (experts) → (R, R').

    Args:
        limit: min(d_out, d_in), which is divided among the experts.

    >>> import torch
    >>> deltas = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])
    >>> merge(deltas, torch.ones(2), limit=2)
    tensor([[2., 0.],
            [0., 3.]])
    """
    import torch

    k = max(1, limit // len(deltas))
    triples = [svd(delta) for delta in deltas]
    U = torch.cat([U[:, :k] for U, _, _ in triples], dim=1)
    S = torch.cat([weight * S[:k] for weight, (_, S, _) in zip(weights.tolist(), triples, strict=True)])
    Vh = torch.cat([Vh[:k] for _, _, Vh in triples])
    return scale * (whiten(U) * S) @ whiten(Vh.mT).mT


METHOD = MergeMethod(
    name="tsv",
    summary="The sum of the leading singular triples of the updates, decorrelated.",
    formula="ΔW = scale · Σ U_⊥n diag(w_n σ_n) V_⊥nᵀ",
    paper="TSV-Merge, arXiv 2412.00081, section 4",
    space=Space.SPECTRAL,
    needs=("limit",),
    breaks={"copies": "N equal experts share their directions and give ΔW Σ w_n/N; with weights of 1, the expert"},
    weights=ones,
    merge=merge,
    options=options_of(merge, SCALE),
)
