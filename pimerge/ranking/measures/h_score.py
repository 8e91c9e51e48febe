"""H-score with a shrunk covariance: how much of the features' variance lies between the classes.

With Σ the covariance of the features, Σ_y that of their class means and d their dimension,

    H = (1 − a) tr(Σ_a⁻¹ Σ_y),   Σ_a = (1 − a) Σ + a · tr(Σ)/d · I.

This is the H-score of Bao et al. (2019), tr(Σ⁻¹ Σ_y), with the correction of Ibrahim et al. (arXiv 2110.06893) for few
examples: a is the shrinkage of Ledoit and Wolf (2004), here at least 1e-9, so that Σ_a is never singular.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


_LEAST_SHRINKAGE = 1e-9
_ROUNDING = 1e-12


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute H, in [0, classes − 1], for each row of weights; 0 if all features are equal.

    Args:
        features: features with vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[1.0], [1.5], [5.0], [5.5]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> [round(float(scores(TargetFeatures(x, torch.tensor(y), 2), ones)), 2) for y in ([0, 0, 1, 1], [0, 1, 0, 1])]
    [0.98, 0.02]
    """
    import torch
    from torch.nn.functional import one_hot

    from pimerge.models.linear_probe import in_row_space

    vectors = in_row_space(features.vectors)
    targets = one_hot(features.labels, features.classes).double()
    d = features.vectors.shape[1]
    return torch.stack([_score(vectors, targets, draw, d) for draw in weights])


def _score(vectors: Tensor, targets: Tensor, weights: Tensor, d: int) -> Tensor:
    import torch

    from pimerge.models.linear_probe import standardised

    n = weights.sum()
    X = standardised(vectors, weights)  # so tr Σ is 1
    if not X.any():
        return torch.zeros((), dtype=torch.float64)
    weighted = (weights / n)[:, None] * X
    covariance = X.T @ weighted
    shares = weights / n @ targets
    means = weighted.T @ targets / torch.where(shares > 0, shares, torch.inf).sqrt()  # Σ_y = means · meansᵀ
    shrinkage = _ledoit_wolf(X, covariance, weights, d)
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage / d)
    return (1 - shrinkage) * (means * torch.cholesky_solve(means, torch.linalg.cholesky(shrunk))).sum()


def _ledoit_wolf(X: Tensor, covariance: Tensor, weights: Tensor, d: int) -> Tensor:
    """Compute the shrinkage a: the variance of Σ's estimate over its squared distance to tr(Σ)/d · I, at most 1."""
    import torch

    n, square = weights.sum(), covariance.square().sum()
    distance = square - 1 / d
    variance = (weights @ X.square().sum(1).square() / n - square) / n
    if distance <= _ROUNDING * square:  # Σ equals that matrix, as in one dimension
        return torch.full_like(square, _LEAST_SHRINKAGE)
    return (variance / distance).clamp(_LEAST_SHRINKAGE, 1.0)


MEASURE = Measure(
    name="h-score",
    summary="H-score with a shrunk covariance: how much of the features' variance lies between the classes.",
    needs=Needs.EXAMPLES,
    scores=scores,
)
