"""Mean log-likelihood of held-out labels, in nats per example, by a linear probe on the expert's features.

See :func:`pimerge.models.linear_probe.held_out_log_likelihood`. The choice of the penalty by the same likelihood
flatters every candidate a little, and alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """The weighted mean of the examples' held-out log-likelihoods, one for each row of weights.

    The probes are fitted once, on the examples as they are: in a fit on repeated examples the same one would
    stand in the training and be held out at once. The only example of a class counts nowhere; a draw that has
    none but such gets the mean of all others, of which it says nothing.

    Args:
        features: needs vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64, at most 0.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[-1.0], [1.0], [-0.9], [0.9]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> [round(float(scores(TargetFeatures(x, torch.tensor(y), 2), ones)), 1) for y in ([0, 1, 0, 1], [0, 0, 1, 1])]
    [-0.0, -1.3]
    """
    from pimerge.models.linear_probe import held_out_log_likelihood

    return mean_of_held_out(held_out_log_likelihood(features.vectors, features.labels, features.classes), weights)


def mean_of_held_out(found: Tensor, weights: Tensor) -> Tensor:
    """The weighted means of what was found of each example: (n), (draws × n) → (draws); NaN counts nowhere."""
    held = ~found.isnan()
    found, weights = found[held], weights[:, held]
    weights = weights.where(weights.sum(1, keepdim=True) > 0, 1.0)
    return weights @ found / weights.sum(1)


MEASURE = Measure(
    name="probe",
    summary="Mean log-likelihood of held-out labels, in nats per example, by a linear probe on the expert's features.",
    needs=Needs.EXAMPLES,
    scores=scores,
    held_out=True,
    least_per_class=2,
)
