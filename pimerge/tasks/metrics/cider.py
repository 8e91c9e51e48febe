"""CIDEr (arXiv 1411.5726), by pycocoevalcap, from 0 to 10: n-grams that answer and references share.

Rare n-grams count more; their frequencies are those in the references of the test split. Words are lower-case runs
of letters and digits.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pimerge.tasks.metric import Answers, Metric, require_library
from pimerge.tasks.metrics._mean import column, value

if TYPE_CHECKING:
    from torch import Tensor


def statistics(answers: Answers) -> Tensor:
    """CIDEr of each answer."""
    cider = require_library("pycocoevalcap.cider.cider").Cider()
    references = {index: [_words(text) for text in texts] for index, texts in enumerate(answers.references)}
    texts = {index: [_words(text)] for index, text in enumerate(answers.texts)}
    _, found = cider.compute_score(references, texts)
    return column([float(score) for score in found])


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


METRIC = Metric(
    name="cider",
    summary="CIDEr (arXiv 1411.5726), by pycocoevalcap, from 0 to 10: n-grams that answer and references share.",
    needs=("texts",),
    format=".2f",
    statistics=statistics,
    value=value,
)
