"""Choose shots, numbers of experts and each method's rows from a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option
from pimerge.reporting.figure import FigureInputs
from pimerge.reporting.figures._canvas import look, percent
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine, ComparisonRun

TEST = "test"
ALL = "all"
INPUTS = ("comparison",)
K = Option("k", int, "How many experts of the ranking the methods had. Default: the most.")
SHOTS = Option("shots", str, "Training examples per class, a number or all. The default depends on the plot.")
Row = TypeVar("Row", bound="ComparisonLine | ComparisonRun")


def open_comparison(inputs: FigureInputs) -> ComparisonDocument:
    """Read what ``pimerge compare`` wrote; it must have finished runs."""
    from pimerge.evaluation.schema import read_comparison

    found = read_comparison(inputs.comparison)
    if not found.lines:
        raise PimergeError(f"'{inputs.comparison}' has no finished runs", "run the same 'pimerge compare' again")
    return found


def methods(comparison: ComparisonDocument) -> dict[str, bool]:
    """Method → whether it is a control, in the comparison's order."""
    return {line.method: line.control for line in comparison.lines}


def in_percent(comparison: ComparisonDocument) -> bool:
    """Whether the scores are shares."""
    style: str = METRICS.load(comparison.metric).format
    return style.endswith("%")


def by_shots(found: set[int | None]) -> list[int | None]:
    """Numbers of shots, ascending; all of them last.

    >>> by_shots({None, 20, 5})
    [5, 20, None]
    """
    return sorted(found, key=lambda shots: (shots is None, shots or 0))


def shots_option(shots: int | None) -> str:
    """As ``--shots`` takes it."""
    return ALL if shots is None else str(shots)


def chosen_k(comparison: ComparisonDocument, k: int | None) -> int:
    """The number of experts that was asked for, by default the largest."""
    known = sorted({line.k for line in comparison.lines})
    if k is None:
        return known[-1]
    if k not in known:
        raise PimergeError(
            f"the comparison has no runs with {k} experts, it has {', '.join(map(str, known))}",
            f"run 'pimerge compare --experts {k} …', or pass another -k",
        )
    return k


def chosen_shots(comparison: ComparisonDocument, shots: str | None, default: int | None) -> int | None:
    """The number of shots that was asked for, or the default."""
    if shots is None:
        return default
    known = [shots_option(each) for each in by_shots({line.shots for line in comparison.lines})]
    if shots not in known:
        raise PimergeError(
            f"the comparison has no runs of {shots} shots, it has {', '.join(known)}",
            f"run 'pimerge compare --shots {shots} …', or pass another --shots",
        )
    return None if shots == ALL else int(shots)


def at_k(rows: Sequence[Row], method: str, k: int) -> list[Row]:
    """The rows of a method with k experts; all of a method that has one number of experts alone, whichever."""
    own = [row for row in rows if row.method == method]
    return own if len({row.k for row in own}) == 1 else [row for row in own if row.k == k]


def looks(comparison: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Method → how its line looks: the same in every plot of one comparison; controls are thinner and open."""
    found = {}
    for place, (method, control) in enumerate(comparison.items()):
        thin = {"linewidth": 1.0, "markerfacecolor": "white"} if control else {"linewidth": 1.8}
        found[method] = {**look(place), **thin, "markersize": 5}
    return found


def curve(
    axes: Axes,
    places: Sequence[int],
    mean: Sequence[float],
    sd: Sequence[float],
    style: dict[str, Any],
    shade: float = 0.1,
) -> None:
    """A line of means, with a band of ± one standard deviation."""
    low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=style["color"], alpha=shade, linewidth=0)
    axes.plot(places, mean, **style)


def scores_axis(axes: Axes, metric: str, percents: bool) -> None:
    """Name the axis of scores."""
    axes.set_ylabel(metric)
    if percents:
        percent(axes)
