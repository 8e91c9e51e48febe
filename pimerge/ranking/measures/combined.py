"""Expected gain over the bare base in accuracy, from held-out answers and, with few examples, the store (default).

    gain = w_l · (likelihood(candidate) − likelihood(base)) + w_s · (1/K − 1/K_e) · strength · fisher(target, candidate)

The first part is the measure ``likelihood`` on K examples per class. The second part is the measure ``fisher``, which
adds information if the target's expert in the store was embedded with more examples, K_e per class.

The weights are rounded from least-squares fits to the true gains in development pools, without an intercept, so that
the base has the gain 0. A fit on one pool predicts the other pools nearly as well as their own fits
(``examples/benchmarks/ranking.py``). With one example per class nothing can be held out, and the measure ``label-cka``
takes the place of ``likelihood``; it is less reliable, so its weight is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pimerge.ranking.measure import Measure, Needs
from pimerge.ranking.measures import label_cka, likelihood

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.embedding.features import TargetFeatures

LIKELIHOOD_WEIGHT = 0.6
CKA_WEIGHT = 0.1
STORE_WEIGHT = 1.3


def scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    """Return the weighted first part; minus its value for the base it is the expected gain, with 0.01 for a point.

    Args:
        features: features with vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> import torch
    >>> from pimerge.embedding.features import TargetFeatures
    >>> x = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.9]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> good, bad = (scores(TargetFeatures(x, torch.tensor(y), 2), ones) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    >>> bool(good > bad)
    True
    """
    part = part_of(features)
    return part.weight * part.measure.scores(features, weights)


class Part(NamedTuple):
    """The measure of the first part, and its weight."""

    measure: Measure
    weight: float


def part_of(features: TargetFeatures) -> Part:
    """Return the first part for these examples; holding out examples takes two of a class."""
    if features.labels.bincount().max() < 2:
        return Part(label_cka.MEASURE, CKA_WEIGHT)
    return Part(likelihood.MEASURE, LIKELIHOOD_WEIGHT)


def store_weight(seen: float, by_expert: float) -> float:
    """Return the expected gain at full strength for a similarity of 1 in the store.

    Args:
        seen: number of examples per class that the target gives, K; at least 2 is assumed.
        by_expert: number of examples per class with which the target's expert was embedded, K_e.

    >>> round(store_weight(5, 50), 3), store_weight(16, 16)
    (0.234, 0.0)
    """
    return STORE_WEIGHT * max(0.0, 1 / max(seen, 2.0) - 1 / max(by_expert, 2.0))


MEASURE = Measure(
    name="combined",
    summary=(
        "Expected gain over the bare base in accuracy, from held-out answers and, with few examples, the store "
        "(default)."
    ),
    needs=Needs.EXAMPLES,
    scores=scores,
    held_out=True,
    is_gain=True,
)
