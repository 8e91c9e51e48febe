"""Steps of metrics that are means over the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.metric import Answers


def value(sums: Tensor, n: int) -> Tensor:
    """(draws × 1) → the mean of each draw, (draws)."""
    return sums[:, 0] / n


def column(values: Sequence[float]) -> Tensor:
    """One number of each example, (n × 1)."""
    import torch

    return torch.tensor(values, dtype=torch.float64)[:, None]


def best(answers: Answers, score: Callable[[str, str], float]) -> Tensor:
    """The best score of each example's answer against one of its references, (n × 1)."""
    pairs = zip(answers.texts, answers.references, strict=True)
    return column([max(score(text, reference) for reference in references) for text, references in pairs])
