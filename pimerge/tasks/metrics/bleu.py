"""Corpus BLEU (Papineni et al., 2002), by sacrebleu with its defaults, from 0 to 100."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, require_library

if TYPE_CHECKING:
    from torch import Tensor


_ORDERS = 4


def statistics(answers: Answers) -> Tensor:
    """Of each example: matching n-grams and all of them, n from 1 to 4, and the lengths of answer and reference."""
    import torch

    bleu = require_library("sacrebleu").BLEU(effective_order=True)  # sentence counts add up to corpus counts
    rows = []
    for text, references in zip(answers.texts, answers.references, strict=True):
        found = bleu.sentence_score(text, list(references))
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return torch.tensor(rows, dtype=torch.float64)


def value(sums: Tensor, n: int) -> Tensor:
    """BLEU of each draw from its counts, (draws)."""
    import torch

    compute = require_library("sacrebleu").BLEU.compute_bleu
    found = []
    for row in sums.long().tolist():
        matching, whole, (answered, reference) = row[:_ORDERS], row[_ORDERS:-2], row[-2:]
        found.append(compute(matching, whole, answered, reference, smooth_method="exp").score)
    return torch.tensor(found, dtype=torch.float64)


METRIC = Metric(
    name="bleu",
    summary="Corpus BLEU (Papineni et al., 2002), by sacrebleu with its defaults, from 0 to 100.",
    needs=("texts",),
    format=".1f",
    statistics=statistics,
    value=value,
)
