"""Mean probability of the right label for held-out examples, by linear probes on the expert's features.

See :func:`pimerge.models.linear_probe.held_out_probability`. Unlike the log-likelihood of ``probe``, it does not
give more weight to confident wrong answers, so it varies less and is closer to an accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs
from pimerge.ranking.measures.probe import mean_of_held_out

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute the weighted mean of the examples' probabilities for each row of weights.

    Args:
        features: features with vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts; see :func:`pimerge.ranking.measures.probe.scores`.

    Returns:
        (draws) float64, 0 to 1.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[-1.0], [1.0], [-0.9], [0.9]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> [round(float(scores(TargetFeatures(x, torch.tensor(y), 2), ones)), 1) for y in ([0, 1, 0, 1], [0, 0, 1, 1])]
    [0.9, 0.3]
    """
    from pimerge.models.linear_probe import held_out_probability

    return mean_of_held_out(held_out_probability(features.vectors, features.labels, features.classes), weights)


MEASURE = Measure(
    name="likelihood",
    summary="Mean probability of the right label for held-out examples, by linear probes on the expert's features.",
    needs=Needs.EXAMPLES,
    scores=scores,
    held_out=True,
    least_per_class=2,
)
