"""F1 of the words that answer and reference share, as SQuAD counts them, by torchmetrics; the best reference counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, require_library
from pimerge.tasks.metrics._mean import column, value

if TYPE_CHECKING:
    from torch import Tensor


def statistics(answers: Answers) -> Tensor:
    """F1 of each answer (arXiv 1606.05250): lower case, without punctuation and articles."""
    squad = require_library("torchmetrics.functional.text").squad

    def f1(text: str, references: list[str]) -> float:
        target = {"answers": {"answer_start": [0] * len(references), "text": references}, "id": "0"}
        return float(squad([{"prediction_text": text, "id": "0"}], [target])["f1"]) / 100

    pairs = zip(answers.texts, answers.references, strict=True)
    return column([f1(text, list(references)) for text, references in pairs])


METRIC = Metric(
    name="token-f1",
    summary="F1 of the words that answer and reference share, as SQuAD counts them; the best reference counts.",
    needs=("texts",),
    format=".1%",
    statistics=statistics,
    value=value,
)
