"""Share of the answers that are one of the references, letter by letter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metrics._mean import best, value

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.metric import Answers

__all__ = ["FORMAT", "NEEDS", "statistics", "value"]

NEEDS = "texts"
FORMAT = ".1%"


def statistics(answers: Answers) -> Tensor:
    """1 for an answer that is a reference but for white space around it, else 0."""
    return best(answers, lambda text, reference: float(text.strip() == reference.strip()))
