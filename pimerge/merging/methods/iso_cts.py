"""Common and task-specific directions, all at one singular value (Iso-CTS, arXiv 2502.04959, section 4.2).

1. The k = round(common · r) leading singular triples (u, σ, v) of Σ w_n ΔW_n, which has rank r, are common.
2. The (r − k) // N leading triples of each w_n ΔW_n − UUᵀ w_n ΔW_n are task-specific, where U contains the common u.
3. All u and all v are replaced by the nearest orthonormal vectors, and ΔW = scale · σ̄ Σ u vᵀ, where σ̄ is the mean of
   all σ.

The w_n are not in the paper, and are 1 by default. The paper's matrices have full rank. Here, null directions, which
are arbitrary, are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, SHARE, is_share, options_of
from pimerge.merging.methods._spectrum import STORED, svd, whiten
from pimerge.merging.methods._weights import ones

if TYPE_CHECKING:
    from torch import Tensor

COMMON = Option("common", float, "Share of directions that are common.", is_share, SHARE)


def merge(deltas: Tensor, weights: Tensor, *, common: float = 0.8, scale: float = 1.0) -> Tensor:
    """Join the directions and flatten the spectrum: (experts, R, R'), (experts) → (R, R').

    >>> import torch
    >>> merge(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.ones(1), common=0.5)
    tensor([[2., 0.],
            [0., 2.]])
    """
    import torch

    parts = weights.to(deltas)[:, None, None] * deltas
    U, S, Vh = svd(parts.sum(0), null=STORED)
    k = round(common * len(S))
    own = (len(S) - k) // len(deltas)
    U, S, Vh = U[:, :k], S[:k], Vh[:k]
    triples = [(U, S, Vh)]
    for part in parts:
        u, s, vh = svd(part - U @ (U.mT @ part), null=STORED, of=part)
        triples.append((u[:, :own], s[:own], vh[:own]))
    left = whiten(torch.cat([u for u, _, _ in triples], dim=1))
    right = whiten(torch.cat([vh for _, _, vh in triples]).mT)
    mean = torch.cat([s for _, s, _ in triples]).mean()
    return (scale * mean * left) @ right.mT


METHOD = MergeMethod(
    name="iso-cts",
    summary="Common and task-specific directions, all at one singular value.",
    formula="ΔW = scale · σ̄ Σ u vᵀ over common and task-specific directions u, v",
    paper="Iso-CTS, arXiv 2502.04959, section 4.2",
    space=Space.SPECTRAL,
    breaks=dict.fromkeys(("identity", "copies"), "the singular values become equal"),
    weights=ones,
    merge=merge,
    options=options_of(merge, COMMON, SCALE),
)
