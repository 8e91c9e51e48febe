"""What a model makes of the target's few labelled examples: all that an example-based measure looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """n examples of the target, seen through the base or through the base with one candidate expert.

    Attributes:
        vectors: (n × d) float64, what the task head reads of each example.
        labels: (n) int64, the target's classes 0 … classes − 1.
        classes: how many classes the target has; at least two of them are in ``labels``.
        logits: (n × classes of the candidate's own head), what that head answers; None without a head.
        losses: (n) −log p(y|x) of the target's labels by a head that knows them; None without one.
    """

    vectors: Tensor
    labels: Tensor
    classes: int
    logits: Tensor | None = None
    losses: Tensor | None = None
