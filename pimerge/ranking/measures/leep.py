"""LEEP: how well the output of the expert's own head, over its own classes, predicts the labels.

With θ(x)_z the head's probabilities, P(y, z) = 1/n Σ_{i: y_i = y} θ(x_i)_z and P(y|z) = P(y, z) / P(z), the score
is 1/n Σ_i log Σ_z P(y_i|z) θ(x_i)_z (LEEP, arXiv 2002.12462, section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute the mean log-likelihood of the labels, in nats, for each row of weights.

    Args:
        features: features with labels and logits (n × the head's classes).
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64, at most 0.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> logits = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> samples = [TargetFeatures(logits, torch.tensor(y), 2, logits) for y in ([0, 0, 1, 1], [0, 1, 0, 1])]
    >>> [round(float(scores(features, ones)), 2) for features in samples]
    [-0.01, -0.69]
    """
    import torch
    from torch.nn.functional import one_hot

    if features.logits is None:
        raise PimergeError(
            "the expert gives no class probabilities, which leep needs",
            "train it with its head saved (modules_to_save), score by likelihood, or use a measure of features: logme",
        )
    answers = features.logits.double().softmax(1)
    targets = one_hot(features.labels, features.classes).double()
    return torch.stack([_score(answers, targets, draw) for draw in weights])


def _score(answers: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    import torch

    joint = targets.T @ (weights[:, None] * answers)  # (classes × the head's)
    mass = joint.sum(0)
    conditional = joint / torch.where(mass > 0, mass, torch.inf)
    likelihood = ((answers @ conditional.T) * targets).sum(1)
    return torch.xlogy(weights, likelihood).sum() / weights.sum()  # xlogy: weight and likelihood may be 0


MEASURE = Measure(
    name="leep",
    summary="LEEP: how well the output of the expert's own head, over its own classes, predicts the labels.",
    needs=Needs.EXAMPLES,
    scores=scores,
    reads_answers=True,
)
