"""The update that disturbs each expert least: min Σ w_n ‖(ΔW − ΔW_n)ΔW_nᵀ‖²/‖ΔW_n‖² (WUDI, arXiv 2503.08099).

The rows of ΔW_n approximate the inputs of expert n. The paper takes 300 steps of Adam from Σ ΔW_n. Since the objective
is quadratic, its minimum is computed exactly here, by least squares on the stacked ΔW_n rather than on their squares.
Of several minima, the one nearest to the weighted mean is taken; they differ only in directions that are rounding
errors. The w_n are not in the paper. Only their ratios count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._spectrum import STORED, svd
from pimerge.merging.methods._weights import ratios, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def merge(deltas: Tensor, weights: Tensor) -> Tensor:
    """Compute the exact minimum: (experts, R, R'), (experts) → (R, R').

    With X_n = √w_n ΔW_n/‖ΔW_n‖ stacked to X and the start τ, it is τ + [(ΔW_n − τ)X_nᵀ]_n (Xᵀ)⁺.

    >>> import torch
    >>> deltas = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])
    >>> merge(deltas, torch.ones(2))
    tensor([[2., 0.],
            [0., 3.]])
    """
    import torch

    weights = weights.to(deltas)
    norms = torch.linalg.vector_norm(deltas, dim=(1, 2))
    factors = torch.where(norms > 0, weights.sqrt() / norms, 0)
    X = factors[:, None, None] * deltas
    start = weighted_sum(deltas, weights / weights.sum())
    missing = ((deltas - start) @ X.mT).transpose(0, 1).flatten(1)  # (R, experts · R)
    P, S, Qh = svd(X.flatten(0, 1), null=STORED)
    return start + (missing @ P / S) @ Qh


METHOD = MergeMethod(
    name="wudi",
    summary="The update that disturbs each expert least.",
    formula="ΔW = argmin Σ w_n ‖(ΔW − ΔW_n)ΔW_nᵀ‖²/‖ΔW_n‖²",
    paper="WUDI, arXiv 2503.08099",
    space=Space.SPECTRAL,
    weights=ratios,
    merge=merge,
)
