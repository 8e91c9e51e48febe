"""Share of the examples that are given their class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.metrics._mean import column, value

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.metrics import Answers

__all__ = ["FORMAT", "NEEDS", "statistics", "value"]

NEEDS = "classes"
FORMAT = ".1%"


def statistics(answers: Answers) -> Tensor:
    """1 for the right class, else 0."""
    return column([float(chosen == label) for chosen, label in zip(answers.chosen, answers.labels, strict=True)])
