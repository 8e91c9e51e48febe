"""Expected gain over the bare base in accuracy, from held-out answers and, with few examples, the store (default).

    gain = w_l · (likelihood(candidate) − likelihood(base)) + w_s · (1/K − 1/K_e) · strength · fisher(target, candidate)

The first part is that of the measure ``likelihood`` on the K examples a class that are looked at. The second counts
where the target has an expert in the store that saw more, K_e a class: the measure ``fisher`` then knows what these few
cannot tell.

The weights, without an intercept, so that the base itself has the gain 0, are rounded from least-squares fits of the
true gains of development pools; a fit on one pool predicts the others nearly as well as their own
(``examples/benchmarks/ranking.py``). With one example a class nothing can be held out, and label-CKA, which stands in,
says little: its weight is small.
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
    """The weighted part; its difference to the base's is the expected gain, 0.01 being a point of accuracy.

    Args:
        features: needs vectors (n × d) and labels.
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
    """The measure that the expected gain is read from, and how much of a gain its unit is."""

    measure: Measure
    weight: float


def part_of(features: TargetFeatures) -> Part:
    """The part that these examples allow: to hold some out takes two of a class."""
    if features.labels.bincount().max() < 2:
        return Part(label_cka.MEASURE, CKA_WEIGHT)
    return Part(likelihood.MEASURE, LIKELIHOOD_WEIGHT)


def store_weight(seen: float, by_expert: float) -> float:
    """Expected gain at full strength for a similarity of 1 in the store.

    Args:
        seen: examples a class that are looked at; of less than two the weight is that of two.
        by_expert: examples a class that the target's expert was embedded with.

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
