"""Score by number of experts, one line per method (π-Tuning, fig. 5).

From ``comparison.json``, at one number of shots. What does not depend on the number of experts, such as most controls,
is a level line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import new_figure, short_names, subtitle
from pimerge.reporting.figures._comparing import (
    INPUTS,
    SHOTS,
    TEST,
    by_shots,
    chosen_shots,
    curve,
    in_percent,
    looks,
    methods,
    open_comparison,
    scores_axis,
    shots_option,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine


@dataclass(frozen=True, kw_only=True)
class ExpertsSeries(FigureData):
    """A method: mean and standard deviation at each number of experts; one number of them is a level line."""

    method: str
    control: bool
    k: list[int]
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True, kw_only=True)
class ExpertsData(FigureData):
    """The data of the plot."""

    target: str
    metric: str
    percent: bool
    shots: int | None
    seeds: int
    series: list[ExpertsSeries]


def collect(comparison: ComparisonDocument, inputs: FigureInputs, *, shots: str | None) -> ExpertsData:
    """Take the lines of one number of shots: by default the least of those with the most numbers of experts."""
    lines = [line for line in comparison.lines if line.test == TEST]
    shots_known = by_shots({line.shots for line in lines})
    most = max(shots_known, key=lambda each: max(_numbers(lines, each).values()), default=None)
    number = chosen_shots(comparison, shots, most)
    if max(_numbers(lines, number).values(), default=0) < 2:
        raise PimergeError(
            f"every method has one number of experts at {shots_option(number)} shots in the comparison",
            "run 'pimerge compare --experts 1,2,4 …'",
        )
    series = []
    for method, control in methods(comparison).items():
        own = {line.k: line for line in lines if line.method == method and line.shots == number}
        if own:
            k = sorted(own)
            mean, sd = [own[each].mean for each in k], [own[each].sd for each in k]
            series.append(ExpertsSeries(method=method, control=control, k=k, mean=mean, sd=sd))
    return ExpertsData(
        target=comparison.target,
        metric=comparison.metric,
        percent=in_percent(comparison),
        shots=number,
        seeds=max(line.seeds for line in lines if line.shots == number),
        series=series,
    )


def _numbers(lines: Sequence[ComparisonLine], shots: int | None) -> Counter[str]:
    """Method → how many numbers of experts it was run with, at a number of shots."""
    return Counter(line.method for line in lines if line.shots == shots)


def draw(data: ExpertsData) -> Drawing:
    """One axis; the numbers of experts stand at equal distances."""
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    every = sorted({k for series in data.series if len(series.k) > 1 for k in series.k})
    style = looks({series.method: series.control for series in data.series})
    for series in data.series:
        level = len(series.k) == 1
        places = [0, len(every) - 1] if level else [every.index(k) for k in series.k]
        mean, sd = (values * 2 if level else values for values in (series.mean, series.sd))
        own = {**style[series.method], **({"marker": ""} if level else {})}
        curve(axes, places, mean, sd, own, 0.05 if level else 0.1)
    axes.set_xticks(range(len(every)), [str(k) for k in every])
    axes.set_xlabel("experts of the ranking at hand")
    scores_axis(axes, data.metric, data.percent)
    names = short_names([series.method for series in data.series])
    figure.legend(axes.get_lines(), names, loc="outside right upper", title="thin: controls", alignment="left")
    shots = "all training examples" if data.shots is None else f"{data.shots} training examples of each class"
    subtitle(figure, f"{data.target}, {shots}; mean ± sd over up to {data.seeds} seeds")
    return figure


FIGURE = Figure(
    name="experts",
    summary="Score by number of experts, one line per method (π-Tuning, fig. 5).",
    options={SHOTS: None},
    data=ExpertsData,
    inputs=INPUTS,
    open=open_comparison,
    collect=collect,
    draw=draw,
)
