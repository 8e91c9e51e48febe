"""The mean of the updates weighted by inverse norm: α_n ∝ w_n/‖ΔW_n‖_F (NAN, arXiv 2505.16148).

The coefficients of a module sum to ``scale``, so an expert does not dominate because it was trained longer or with a
higher learning rate. The w_n are not in the paper. They multiply the inverse norms before normalisation, so only their
ratios count. An expert that does not change a module gets 0 there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import SCALE, options_of
from pimerge.merging.methods._weights import ratios

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(weights: Tensor, *, inner: Tensor, scale: float = 1.0) -> Tensor:
    """Compute λ (w_n/‖ΔW_n‖) / Σ (w_m/‖ΔW_m‖): (experts) → (experts), with ⟨ΔW_i, ΔW_j⟩ (experts, experts).

    >>> import torch
    >>> coefficients(torch.tensor([0.5, 0.5]), inner=torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
    tensor([0.7500, 0.2500])
    """
    import torch

    norms = inner.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, torch.inf)  # gives an inverse norm of 0
    shares = weights * (norms.min() / norms).nan_to_num(0.0)  # relative to the largest inverse norm, against overflow
    return scale * shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)


METHOD = MergeMethod(
    name="nan-weights",
    summary="The mean of the updates, weighted by inverse norm.",
    formula="ΔW = scale · Σ α_n ΔW_n, α_n ∝ w_n/‖ΔW_n‖",
    paper="NAN, arXiv 2505.16148",
    space=Space.LINEAR,
    needs=("inner",),
    weights=ratios,
    coefficients=coefficients,
    options=options_of(coefficients, SCALE),
)
