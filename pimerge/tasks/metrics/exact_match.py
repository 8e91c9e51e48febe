"""Share of the answers that equal a reference, letter by letter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric
from pimerge.tasks.metrics._mean import best, value

if TYPE_CHECKING:
    from torch import Tensor


def statistics(answers: Answers) -> Tensor:
    """1 for an answer that equals a reference except for white space around it, else 0."""
    return best(answers, lambda text, reference: float(text.strip() == reference.strip()))


METRIC = Metric(
    name="exact-match",
    summary="Share of the answers that equal a reference, letter by letter.",
    needs=("texts",),
    format=".1%",
    statistics=statistics,
    value=value,
    is_default=True,
)
