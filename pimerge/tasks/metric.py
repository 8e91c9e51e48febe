"""Metrics of a model's answers to a test split: the family, and functions that its files share.

A metric is the value of sums over the examples, so the metric of a bootstrap sample follows from sums alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """A model's answers to n examples, and the right answers.

    Attributes:
        chosen: class of each answer, or classes of its words; None if the answer is not a class.
        labels: the right classes.
        classes: number of classes of the task; 0 if answers are free text.
        texts: text of each answer.
        references: texts of all right answers to each example.
    """

    chosen: Sequence[int | Sequence[int] | None]
    labels: Sequence[int | Sequence[int]]
    classes: int
    texts: Sequence[str] = ()
    references: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, kw_only=True)
class Metric(Strategy):
    """A metric of answers.

    Attributes:
        needs: forms of answer that the metric can score; see :meth:`pimerge.tasks.task_type.TaskType.answer_forms`.
        format: format specification for display, such as ``.1%``.
        statistics: answers → numbers for each example that add up over examples, (n × m) float64.
        value: their sums over n examples, (draws × m), and n → the metric of each draw, (draws).
        is_default: whether tasks whose main form of answer is in ``needs`` show the metric by default.
        counts_right: whether the metric is the share of right answers, which every score contains.
    """

    needs: tuple[str, ...]
    format: str
    statistics: Callable[[Answers], Tensor]
    value: Callable[[Tensor, int], Tensor]
    is_default: bool = False
    counts_right: bool = False


METRICS = Family("pimerge.tasks.metrics", "metric", "METRIC", Metric)


def by_word(values: Sequence[Any]) -> list[list[Any]]:
    """The classes of each example's words; an example with one class counts as one word.

    >>> by_word([1, None]), by_word([[0, 1]])
    ([[1], [None]], [[0, 1]])
    """
    return [list(value) if isinstance(value, Sequence) else [value] for value in values]


def require_library(name: str) -> ModuleType:
    """Import an optional library that some metrics need; if it is missing, the error says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise PimergeError(
            f"a metric of the task needs the library '{name.partition('.')[0]}', which is not installed",
            "pip install 'pimerge[metrics]'",
        ) from error


def default_metric(form: str) -> str:
    """The metric of a task that names none, by its main form of answer.

    >>> default_metric("classes"), default_metric("texts")
    ('accuracy', 'exact-match')
    """
    return next(metric.name for metric in METRICS if metric.is_default and form in metric.needs)


def check_metrics(names: Sequence[str], forms: Sequence[str]) -> None:
    """Check the names of a task's metrics; all problems are raised at once.

    Args:
        forms: the task's forms of answer.
    """
    problems, known = Problems(), METRICS.names()
    fit = [metric.name for metric in METRICS if set(metric.needs) & set(forms)]
    for name, count in Counter(names).items():
        if name not in known:
            problems.add(f"metrics: there is no metric '{name}'", nearest(name, known))
        elif name not in fit:
            needs = METRICS.load(name).needs[0]
            what = "has no labels" if needs == "classes" else "is not answered in text"
            problems.add(f"metrics: '{name}' is about {needs}, and the task {what}", f"it can have {', '.join(fit)}")
        elif count > 1:
            problems.add(f"metrics: '{name}' is named twice", "name it once")
    problems.raise_any("the metrics do not fit")
