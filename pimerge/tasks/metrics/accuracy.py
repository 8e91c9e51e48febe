"""Share of the examples, or of their words, that are given their class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pimerge.tasks.metric import by_word

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.metric import Answers

NEEDS = "classes"
FORMAT = ".1%"


def statistics(answers: Answers) -> Tensor:
    """How many classes are right, and how many there are, of each example: (n × 2)."""
    pairs = zip(by_word(answers.chosen), by_word(answers.labels), strict=True)
    counts = [(sum(a == b for a, b in zip(chosen, labels, strict=True)), len(labels)) for chosen, labels in pairs]
    return torch.tensor(counts, dtype=torch.float64)


def value(sums: Tensor, n: int) -> Tensor:
    """The share of each draw, (draws)."""
    return sums[:, 0] / sums[:, 1]
