"""Share of the examples, or of their words, that get the right class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, by_word

if TYPE_CHECKING:
    from torch import Tensor


def statistics(answers: Answers) -> Tensor:
    """The right classes and all classes of each example, counted: (n × 2)."""
    import torch

    pairs = zip(by_word(answers.chosen), by_word(answers.labels), strict=True)
    counts = [(sum(a == b for a, b in zip(chosen, labels, strict=True)), len(labels)) for chosen, labels in pairs]
    return torch.tensor(counts, dtype=torch.float64)


def value(sums: Tensor, n: int) -> Tensor:
    """The share of each draw, (draws)."""
    return sums[:, 0] / sums[:, 1]


METRIC = Metric(
    name="accuracy",
    summary="Share of the examples, or of their words, that get the right class.",
    needs=("classes", "choices"),
    format=".1%",
    statistics=statistics,
    value=value,
    is_default=True,
    counts_right=True,
)
