"""Metrics of a model's answers to a test split: the family, and what its files share.

A metric is the value of sums over the examples, so the metric of a bootstrap sample follows from sums alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What a model answered to n examples, and what was right.

    Attributes:
        chosen: the class of each answer, or the classes of its words; None where it is not a class.
        labels: the right classes.
        classes: how many classes the task has; 0 where answers are free text.
        texts: each answer in words.
        references: every right answer to each example, in words.
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
        needs: ``classes``, for tasks with labels, or ``texts``, for types that answer in text.
        format: in which the metric is shown, such as ``.1%``.
        statistics: answers → numbers of each example that add up over examples, (n × m) float64.
        value: sums of these over n examples, (draws × m), and n → the metric of each draw, (draws).
    """

    needs: Literal["classes", "texts"]
    format: str
    statistics: Callable[[Answers], Tensor]
    value: Callable[[Tensor, int], Tensor]


METRICS = Family("pimerge.tasks.metrics", "metric", "METRIC", Metric)


def by_word(values: Sequence[Any]) -> list[list[Any]]:
    """The classes of each example's words; an example that has one class is like one word.

    >>> by_word([1, None]), by_word([[0, 1]])
    ([[1], [None]], [[0, 1]])
    """
    return [list(value) if isinstance(value, Sequence) else [value] for value in values]


def require_library(name: str) -> ModuleType:
    """Import a library that some metrics need and pimerge does not install; a missing one is an error that says so."""
    try:
        return import_module(name)
    except ImportError as error:
        raise PimergeError(
            f"a metric of the task needs the library '{name.partition('.')[0]}', which is not installed",
            "pip install 'pimerge[metrics]'",
        ) from error


def check_metrics(names: Sequence[str], had: Sequence[str]) -> None:
    """Check the names of a task's metrics; all problems are raised at once.

    Args:
        had: what the task's answers offer, of ``classes`` and ``texts``.
    """
    problems, known = Problems(), METRICS.names()
    fit = [metric.name for metric in METRICS if metric.needs in had]
    for name, count in Counter(names).items():
        if name not in known:
            problems.add(f"metrics: there is no metric '{name}'", nearest(name, known))
        elif name not in fit:
            needs = METRICS.load(name).needs
            what = "has no labels" if needs == "classes" else "is not answered in text"
            problems.add(f"metrics: '{name}' is about {needs}, and the task {what}", f"it can have {', '.join(fit)}")
        elif count > 1:
            problems.add(f"metrics: '{name}' is named twice", "name it once")
    problems.raise_any("the metrics do not fit")
