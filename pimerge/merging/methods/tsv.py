"""Leading singular triples of each update, decorrelated, then summed (TSV-Merge, arXiv 2412.00081, section 4).

With ΔW_n ≈ U_n Σ_n V_nᵀ, the k = limit // N leading triples of each expert (at least 1), the concatenations
U = [U_1 … U_N] and V = [V_1 … V_N] are replaced by the nearest matrices with orthonormal columns, U_⊥ = PQᵀ of
U = PDQᵀ, and ΔW = scale · Σ_n U_⊥n diag(w_n σ_n) V_⊥nᵀ. The paper has no w_n, which are 1 by default. Updates
of low rank have null directions, where its full ones have none: they are left out.
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
        limit: min(d_out, d_in), which the experts divide among them.

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
    summary="Leading singular triples of each update, decorrelated, then summed.",
    formula="ΔW = scale · Σ U_⊥n diag(w_n σ_n) V_⊥nᵀ",
    paper="TSV-Merge, arXiv 2412.00081, section 4",
    space=Space.SPECTRAL,
    needs=("limit",),
    breaks={"copies": "N equal experts share their directions and give ΔW Σ w_n/N: the expert at weight 1 each"},
    weights=ones,
    merge=merge,
    options=options_of(merge, SCALE),
)
