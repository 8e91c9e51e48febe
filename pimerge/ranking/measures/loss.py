"""Minus the mean loss, −log p(y|x) in nats, of the target's labels, by a head for these labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Minus the weighted mean of the losses, one score for each row of weights.

    Args:
        features: needs losses (n).
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> features = TargetFeatures(torch.zeros(2, 1), torch.tensor([0, 1]), 2, losses=torch.tensor([1.0, 3.0]))
    >>> scores(features, torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
    tensor([-2., -1.], dtype=torch.float64)
    """
    if features.losses is None:
        raise PimergeError(
            "no head has the target's labels, so their loss cannot be computed",
            "use --measure probe, which fits a head to the examples",
        )
    return -(weights @ features.losses.double()) / weights.sum(1)


MEASURE = Measure(
    name="loss",
    summary="Minus the mean loss, −log p(y|x) in nats, of the target's labels, by a head for these labels.",
    needs=Needs.EXAMPLES,
    scores=scores,
    reads_answers=True,
)
