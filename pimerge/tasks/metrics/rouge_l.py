"""F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), by rouge-score; the best reference counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, require_library
from pimerge.tasks.metrics._mean import best, value

if TYPE_CHECKING:
    from torch import Tensor


def statistics(answers: Answers) -> Tensor:
    """ROUGE-L of each answer, without stemming."""
    scorer = require_library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    return best(answers, lambda text, reference: float(scorer.score(reference, text)["rougeL"].fmeasure))


METRIC = Metric(
    name="rouge-l",
    summary="F1 of the longest common subsequence of words (ROUGE-L), by rouge-score; the best reference counts.",
    needs=("texts",),
    format=".1%",
    statistics=statistics,
    value=value,
)
