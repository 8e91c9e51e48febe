"""Choose shots, numbers of experts and each method's rows from a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option
from pimerge.reporting.figure import FigureData, FigureInputs
from pimerge.reporting.figures._canvas import look, new_figure, percent, short_names, subtitle
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine, ComparisonRun

TEST = "test"
ALL = "all"
INPUTS = ("comparison",)
K = Option("k", int, "How many experts of the ranking the methods had. Default: the most.")
SHOTS = Option("shots", str, "Training examples per class, a number or all. The default depends on the plot.")
Row = TypeVar("Row", bound="ComparisonLine | ComparisonRun")


@dataclass(frozen=True, kw_only=True)
class MethodSeries(FigureData):
    """A method of a comparison in a plot of curves."""

    method: str
    control: bool


@dataclass(frozen=True, kw_only=True)
class CurvesData(FigureData):
    """Data of a plot of curves, one for each method; ``percent`` says whether its scores are fractions."""

    target: str
    metric: str
    percent: bool


def open_comparison(inputs: FigureInputs) -> ComparisonDocument:
    """Read the comparison that ``pimerge compare`` wrote; it must have finished runs."""
    from pimerge.evaluation.schema import read_comparison

    found = read_comparison(inputs.comparison)
    if not found.lines:
        raise PimergeError(f"'{inputs.comparison}' has no finished runs", "run the same 'pimerge compare' again")
    return found


def methods(comparison: ComparisonDocument) -> dict[str, bool]:
    """Return method → whether it is a control, in the order of the comparison."""
    return {line.method: line.control for line in comparison.lines}


def in_percent(comparison: ComparisonDocument) -> bool:
    """Whether the scores are fractions, shown as percentages."""
    style: str = METRICS.load(comparison.metric).format
    return style.endswith("%")


def by_shots(found: set[int | None]) -> list[int | None]:
    """Sort numbers of shots in ascending order, with None, for all examples, last.

    >>> by_shots({None, 20, 5})
    [5, 20, None]
    """
    return sorted(found, key=lambda shots: (shots is None, shots or 0))


def shots_option(shots: int | None) -> str:
    """Return the number of shots as ``--shots`` takes it."""
    return ALL if shots is None else str(shots)


def chosen_k(comparison: ComparisonDocument, k: int | None) -> int:
    """Return the number of experts asked for, by default the largest."""
    known = sorted({line.k for line in comparison.lines})
    if k is None:
        return known[-1]
    if k not in known:
        raise PimergeError(
            f"the comparison has no runs with {k} experts, but with {', '.join(map(str, known))}",
            f"run 'pimerge compare --experts {k} …', or pass another -k",
        )
    return k


def chosen_shots(comparison: ComparisonDocument, shots: str | None, default: int | None) -> int | None:
    """Return the number of shots asked for, or the default."""
    if shots is None:
        return default
    known = [shots_option(each) for each in by_shots({line.shots for line in comparison.lines})]
    if shots not in known:
        raise PimergeError(
            f"the comparison has no runs with {shots} shots, but with {', '.join(known)}",
            f"run 'pimerge compare --shots {shots} …', or pass another --shots",
        )
    return None if shots == ALL else int(shots)


def at_k(rows: Sequence[Row], method: str, k: int) -> list[Row]:
    """Return the rows of a method with k experts; all of its rows if they have a single number of experts."""
    own = [row for row in rows if row.method == method]
    return own if len({row.k for row in own}) == 1 else [row for row in own if row.k == k]


def looks(comparison: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Return method → style of its line, the same in all plots of a comparison; controls are thin with open markers."""
    found = {}
    for place, (method, control) in enumerate(comparison.items()):
        thin = {"linewidth": 1.0, "markerfacecolor": "white"} if control else {"linewidth": 1.8}
        found[method] = {**look(place), **thin, "markersize": 5}
    return found


@dataclass(frozen=True)
class Curve:
    """The curve of a method over places on the horizontal axis; a level curve is faint and has no markers."""

    control: bool
    places: Sequence[int]
    mean: Sequence[float]
    sd: Sequence[float]
    level: bool = False


def draw_curves(
    data: CurvesData, curves: Mapping[str, Curve], ticks: Sequence[str], label: str, key: str, text: str
) -> Drawing:
    """Draw a line of means per method, with a band of ± one standard deviation.

    Args:
        curves: method → its curve.
        ticks: labels of the places.
        label: label of the horizontal axis.
        key: title of the legend.
        text: title of the figure.
    """
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    style = looks({method: curve.control for method, curve in curves.items()})
    for method, curve in curves.items():
        own = {**style[method], **({"marker": ""} if curve.level else {})}
        low, high = ([m + sign * s for m, s in zip(curve.mean, curve.sd, strict=True)] for sign in (-1, 1))
        shade = 0.05 if curve.level else 0.1
        axes.fill_between(curve.places, low, high, color=own["color"], alpha=shade, linewidth=0)
        axes.plot(curve.places, curve.mean, **own)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel(label)
    axes.set_ylabel(data.metric)
    if data.percent:
        percent(axes)
    names = short_names(list(curves))
    figure.legend(axes.get_lines(), names, loc="outside right upper", title=key, alignment="left")
    subtitle(figure, text)
    return figure


def examples_text(shots: int | None) -> str:
    """Return the number of training examples in words, for a title."""
    return "all training examples" if shots is None else f"{shots} training examples of each class"
