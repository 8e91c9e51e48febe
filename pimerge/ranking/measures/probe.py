"""Mean log-likelihood of held-out labels, in nats per example, by a linear probe on the expert's features.

See :func:`pimerge.models.linear_probe.held_out_log_likelihood`. The penalty is chosen by the same likelihood, which
raises the scores of all candidates slightly and about equally.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Compute the weighted mean of the examples' held-out log-likelihoods for each row of weights.

    The probes are fitted once, without repetitions: of a repeated example one copy could be held out while another is
    used for the fit. The only example of a class is ignored; a bootstrap sample of such examples alone gets the mean of
    all other examples.

    Args:
        features: features with vectors (n × d) and labels.
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
    """Compute the weighted means of values (n) with weights (draws × n), without NaN values: (draws)."""
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
