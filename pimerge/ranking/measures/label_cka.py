"""Linear CKA of the features and the labels: whether examples with the same label have similar features.

With X the features and Y the one-hot labels, both centred: ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) (arXiv 1905.00414,
section 3). It does not depend on rotation or scale of the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute the CKA, in [0, 1], for each row of weights; 0 if all features or all labels are equal.

    Args:
        features: features with vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[1.0], [1.0], [5.0], [5.0]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> [round(float(scores(TargetFeatures(x, torch.tensor(y), 2), ones)), 2) for y in ([0, 0, 1, 1], [0, 1, 0, 1])]
    [1.0, 0.0]
    """
    import torch
    from torch.nn.functional import one_hot

    from pimerge.models.linear_probe import in_row_space

    vectors = in_row_space(features.vectors)
    targets = one_hot(features.labels, features.classes).double()
    return torch.stack([_score(vectors, targets, draw) for draw in weights])


def _score(vectors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    import torch

    from pimerge.models.linear_probe import standardised

    X, Y = standardised(vectors, weights), standardised(targets, weights)
    weighted = (weights / weights.sum())[:, None] * X
    norms = (X.T @ weighted).norm() * (Y.T @ ((weights / weights.sum())[:, None] * Y)).norm()
    return (Y.T @ weighted).square().sum() / torch.where(norms > 0, norms, torch.inf)


MEASURE = Measure(
    name="label-cka",
    summary="Linear CKA of the features and the labels: whether examples with the same label have similar features.",
    needs=Needs.EXAMPLES,
    scores=scores,
)
