"""LogME: the evidence of the labels per example given the features, in Bayesian linear regression.

For one class with the one-hot column y (n) and the features X, not centred and without an intercept, the evidence is
log N(y; 0, β⁻¹ I + α⁻¹ X Xᵀ), maximised over the precisions α and β. The score is its mean over the classes, divided
by n (LogME, arXiv 2102.11005). It depends on X only by the spectrum: with σ_j the eigenvalues of XᵀX, z_j the
components of y along the left singular vectors, and t = α/β,

    log p = n/2 · log(β/2π) − β/2 · R(t) − ½ Σ_j log(1 + σ_j/t),   R(t) = ‖y‖² − Σ_j z_j² σ_j/(σ_j + t).

For each t the best β is n/R(t), so only t is searched, on a grid that is refined. The paper's fixed-point iteration
stops at the first optimum. If X explains y without error, as is possible with repeated examples or n < d, the evidence
has no upper bound; therefore the noise variance 1/β is at least 1e-3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures

LEAST_NOISE = 1e-3

_NEGLIGIBLE = 1e-12  # smaller eigenvalues, relative to the largest, are rounding
# range of log t for mean ‖x‖² = 1: from where even negligible directions count, to where no direction counts
_RANGE = (math.log(1e-18), math.log(1e8))
_POINTS = 61
_REFINEMENTS = 3  # each narrows the grid thirtyfold


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute the evidence in nats per example for each row of weights.

    Classes without examples are left out. The scale of the features has no influence, since α absorbs it.

    Args:
        features: features with vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.9]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> [round(float(scores(TargetFeatures(x, torch.tensor(y), 2), ones)), 2) for y in ([0, 0, 1, 1], [0, 1, 0, 1])]
    [-0.09, -1.06]
    """
    import torch
    from torch.nn.functional import one_hot

    from pimerge.models.linear_probe import in_row_space

    size = features.vectors.square().sum(1).mean().sqrt()
    vectors = in_row_space(features.vectors / torch.where(size > 0, size, 1.0))
    targets = one_hot(features.labels, features.classes).double()
    return torch.stack([_score(vectors, targets, draw) for draw in weights])


def _score(vectors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean evidence of the classes that occur; σ and ‖y‖² are divided by n throughout."""
    import torch

    shares = weights / weights.sum()
    counts = shares @ targets
    targets, squares = targets[:, counts > 0], counts[counts > 0]
    weighted = shares[:, None] * vectors
    sigma, axes = torch.linalg.eigh(vectors.T @ weighted)
    kept = sigma > _NEGLIGIBLE * sigma[-1]
    sigma = sigma[kept]
    explained = (axes[:, kept].T @ (weighted.T @ targets)).square().T / sigma  # (classes × r), z²
    left = (squares - explained.sum(1)).clamp(min=0)
    return _maximum(sigma, explained, left, float(weights.sum())).mean()


def _maximum(sigma: Tensor, explained: Tensor, left: Tensor, n: float) -> Tensor:
    """Return (classes) the highest evidence per example over log t."""
    import torch

    low, high = _RANGE
    offsets = torch.linspace(-1, 1, _POINTS, dtype=torch.float64)
    centre, reach = torch.full_like(left, (low + high) / 2), (high - low) / 2
    rows = torch.arange(len(left))
    for _ in range(_REFINEMENTS + 1):
        grid = (centre[:, None] + reach * offsets).clamp(low, high)
        values = _evidence(grid.exp(), sigma, explained, left, n)
        best = values.argmax(1)
        centre, reach = grid[rows, best], reach * 2 / (_POINTS - 1)
    return values[rows, best]


def _evidence(t: Tensor, sigma: Tensor, explained: Tensor, left: Tensor, n: float) -> Tensor:
    """Return (classes × points) the evidence per example at t = α/β (classes × points), for the best β."""
    ratio = sigma / t[:, :, None]  # (classes × points × r)
    residual = left[:, None] + (explained[:, None] / (1 + ratio)).sum(2)
    noise = residual.clamp(min=LEAST_NOISE)
    return -((2 * math.pi * noise).log() + residual / noise + ratio.log1p().sum(2) / n) / 2


MEASURE = Measure(
    name="logme",
    summary="LogME: the evidence of the labels per example given the features, in Bayesian linear regression.",
    needs=Needs.EXAMPLES,
    scores=scores,
)
