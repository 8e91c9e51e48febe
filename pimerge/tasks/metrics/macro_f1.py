"""Mean over the classes of F1, by torchmetrics; a class that never occurs does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, by_word, require_library

if TYPE_CHECKING:
    from torch import Tensor


_NOTHING = -1


def statistics(answers: Answers) -> Tensor:
    """True positives, and all that are answered or right, of each class: (n × 2·classes)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    counts = require_library("torchmetrics.functional.classification").multiclass_stat_scores
    none = answers.classes  # an answer that is not a class is wrong, and counts for no other class
    chosen = [torch.tensor([none if one is None else one for one in row]) for row in by_word(answers.chosen)]
    found = counts(
        pad_sequence(chosen, True, none),
        pad_sequence([torch.tensor(row) for row in by_word(answers.labels)], True, _NOTHING),
        num_classes=answers.classes + 1,
        average="none",
        multidim_average="samplewise",
        ignore_index=_NOTHING,
    ).reshape(len(chosen), -1, 5)[:, : answers.classes]
    right, wrong, _, missed, _ = found.double().unbind(-1)
    return torch.cat([right, 2 * right + wrong + missed], 1)


def value(sums: Tensor, n: int) -> Tensor:
    """The mean over the classes that occur of 2·TP / (2·TP + FP + FN), (draws)."""
    right, whole = sums.chunk(2, 1)
    occurs = whole > 0
    return (2 * right / whole.where(occurs, 1.0)).sum(1) / occurs.sum(1)


METRIC = Metric(
    name="macro-f1",
    summary="Mean over the classes of F1, by torchmetrics; a class that never occurs does not count.",
    needs=("classes",),
    format=".1%",
    statistics=statistics,
    value=value,
)
