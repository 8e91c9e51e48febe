"""Metrics of answers, one file each: how good a model's answers to a test split are.

A metric has

- ``NEEDS``: ``classes`` (of a task with labels) or ``texts`` (of a type that answers in text), and ``FORMAT``, in
  which it is shown;
- ``statistics(answers)``: numbers (n × m) of the examples, in float64, which add up over them;
- ``value(sums, n)``: their sums over n examples, (draws × m), → the metric of each draw, (draws).

So the metric of a bootstrap sample is had from sums alone. Libraries are imported when a metric is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pimerge.core import plugins
from pimerge.core.errors import PimergeError, Problems, nearest

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Answers:
    """What a model answered to n examples, and what was right.

    Attributes:
        chosen: the class of each answer, None for none of them, or the classes of its words; ``labels`` the right ones.
        classes: how many the task has; 0 where answers are free.
        texts: each answer in words; ``references`` every right one.
    """

    chosen: Sequence[int | Sequence[int] | None]
    labels: Sequence[int | Sequence[int]]
    classes: int
    texts: Sequence[str] = ()
    references: Sequence[Sequence[str]] = ()


def by_word(values: Sequence[Any]) -> list[list[Any]]:
    """The classes of each example's words; an example that has one class is like one word.

    >>> by_word([1, None]), by_word([[0, 1]])
    ([[1], [None]], [[0, 1]])
    """
    return [list(value) if isinstance(value, Sequence) else [value] for value in values]


def require_library(name: str) -> ModuleType:
    """A library that metrics need and pimerge does not.

    Raises:
        PimergeError: if it is not there.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise PimergeError(
            f"a metric of the task needs the library '{name.partition('.')[0]}', which is not installed",
            "pip install 'pimerge[metrics]'",
        ) from error


def check_metrics(names: Sequence[str], had: Sequence[str]) -> None:
    """Check the names of metrics.

    Args:
        had: what there is for them to look at, ``classes`` and ``texts``.

    Raises:
        PimergeError: with each that is unknown, named twice, or needs something else.
    """
    problems, known = Problems(), list(plugins.summaries("pimerge.tasks.metrics"))
    fit = [name for name in known if plugins.load("pimerge.tasks.metrics", name).NEEDS in had]
    for name, count in Counter(names).items():
        if name not in known:
            problems.add(f"metrics: there is no metric '{name}'", nearest(name, known))
        elif name not in fit:
            needs = plugins.load("pimerge.tasks.metrics", name).NEEDS
            what = "has no labels" if needs == "classes" else "is not answered in text"
            problems.add(f"metrics: '{name}' is about {needs}, and the task {what}", f"it can have {', '.join(fit)}")
        elif count > 1:
            problems.add(f"metrics: '{name}' is there twice", "name it once")
    problems.raise_any("the metrics do not fit")
