"""Recognise a head whose classes are in another order than the task's labels.

Such a model is far worse than guessing, or much better once its classes are renamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pimerge.tasks.metric import by_word

_UNLIKELY = 0.001
_GAIN = 0.2
_LEAST = 20


def label_order_remark(
    chosen: Sequence[int | Sequence[int] | None], right: Sequence[int | Sequence[int]], names: Sequence[str], where: str
) -> str:
    """What to say about a model's answers if its labels seem to be in another order; empty otherwise.

    The order is suspected if the accuracy is below chance, 1/C, by more than chance would explain (p < 0.001), or if
    another assignment of classes to names halves the errors, on at least 20 answers.

    Args:
        chosen: class of each answer, or classes of its words.
        right: the right classes.
        names: names of the classes.
        where: the examples, in words.

    >>> label_order_remark([1, 0] * 10, [0, 1] * 10, ["neg", "pos"], "its examples").partition(":")[0]
    'accuracy 0% on its examples, and 100% if the labels were in the order pos, neg'
    >>> label_order_remark([0, 1] * 10, [0, 1] * 10, ["neg", "pos"], "its test examples")
    ''
    """
    from scipy.stats import binom

    counts = _confusion(chosen, right, len(names))
    total = int(counts.sum())
    if len(names) < 2 or not total:
        return ""
    own, best, order = _best_order(counts)
    below = binom.cdf(round(own * total), total, 1 / len(names)) < _UNLIKELY
    renamed = total >= _LEAST and best - own >= _GAIN and best >= (1 + own) / 2
    if not below and not renamed:
        return ""
    found = f"accuracy {own:.0%} on {where}"
    if best > own and len(names) <= 10:
        found += f", and {best:.0%} if the labels were in the order {', '.join(names[place] for place in order)}"
    elif below:
        found += f", far below chance ({1 / len(names):.0%})"
    return f"{found}: the head was probably trained with another order of labels; correct 'labels' in task.json"


def _confusion(chosen: Sequence[int | Sequence[int] | None], right: Sequence[int | Sequence[int]], classes: int) -> Any:
    """Counts of answers, (classes chosen × classes right)."""
    import numpy

    counts = numpy.zeros((classes, classes), int)
    for answers, truths in zip(by_word(chosen), by_word(right), strict=True):
        for answer, truth in zip(answers, truths, strict=True):
            if answer is not None:
                counts[answer, truth] += 1
    return counts


def _best_order(counts: Any) -> tuple[float, float, list[int]]:
    """The accuracy, the highest accuracy with renamed classes, and the class that each index means then."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(counts, maximize=True)
    total = counts.sum()
    return float(counts.trace() / total), float(counts[rows, columns].sum() / total), columns.tolist()
