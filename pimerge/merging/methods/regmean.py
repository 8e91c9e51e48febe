"""The update whose outputs are nearest to the experts': [Σ w_n ΔW_n G_n][Σ w_n G_n]⁻¹ (RegMean, arXiv 2212.09849).

G_n = XᵀX is the Gram matrix of the layer's inputs on the data of expert n (eq. 2). Its off-diagonal entries are
multiplied by ``offdiagonal``, the paper's α (section 4.1). Two things are not in the paper: the weights w_n, of which
only the ratios count, and a ridge of 1e-6 of the mean diagonal entry, the same for every G_n. With the ridge, the sum
can be inverted, one expert comes back unchanged, and an input that is 0 in all data gets the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._options import options_of
from pimerge.merging.methods._weights import ratios

if TYPE_CHECKING:
    from torch import Tensor

OFFDIAGONAL = Option(
    "offdiagonal",
    float,
    "Factor of the input Grams off the diagonal.",
    lambda factor: 0 <= factor <= 1,
    "at least 0 and at most 1",
)
RIDGE = 1e-6


def transformed(
    rows: Sequence[Tensor], weights: Tensor, *, grams: Sequence[Tensor], offdiagonal: float = 0.9
) -> list[Tensor]:
    """Compute A_n w_n G'_n (Σ w_m G'_m)⁻¹ for each expert; the merged ΔW is the sum of B_n times these.

    Args:
        rows: A of each expert, or its ΔW, (r_n, d_in).
        grams: input Gram of each expert, (d_in, d_in).

    >>> import torch
    >>> rows = [torch.tensor([[4.0, 4.0]]), torch.tensor([[0.0, 0.0]])]
    >>> grams = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0]))]
    >>> transformed(rows, torch.tensor([0.5, 0.5]), grams=grams)[0].round(decimals=3)
    tensor([[3., 2.]])
    """
    import torch

    shares = (weights / weights.sum()).tolist()
    softened = [_softened(gram.double(), offdiagonal) for gram in grams]
    mean = sum((share * gram for share, gram in zip(shares, softened, strict=True)), torch.zeros_like(softened[0]))
    ridge = RIDGE * float(mean.diagonal().mean()) or 1.0
    mean.diagonal().add_(ridge)
    triangle, failed = torch.linalg.cholesky_ex(mean)
    if failed:
        raise PimergeError("the Gram matrices of the inputs are not positive semidefinite", "collect them again")
    results = []
    for A, gram, share in zip(rows, softened, shares, strict=True):
        gram.diagonal().add_(ridge)
        # as a correction to the weighted mean, so that one expert comes back without a rounding error
        excess = share * (A.double() @ (gram - mean))
        results.append((share * A.double() + torch.cholesky_solve(excess.mT, triangle).mT).to(A.dtype))
    return results


def _softened(gram: Tensor, offdiagonal: float) -> Tensor:
    import torch

    return offdiagonal * gram + (1 - offdiagonal) * torch.diag(gram.diagonal())


METHOD = MergeMethod(
    name="regmean",
    summary="The update whose outputs are nearest to the experts' outputs.",
    formula="ΔW = [Σ w_n ΔW_n G_n][Σ w_n G_n]⁻¹, with the input Grams G_n",
    paper="RegMean, arXiv 2212.09849, section 4",
    space=Space.INPUTS,
    needs=("grams",),
    weights=ratios,
    transformed=transformed,
    options=options_of(transformed, OFFDIAGONAL),
)
