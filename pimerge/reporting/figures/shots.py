"""Score by number of examples per class, one line per method with a band of ± one standard deviation.

From ``comparison.json``; the deviation is over seeds, each with another sample of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import new_figure, short_names, subtitle
from pimerge.reporting.figures._comparing import (
    INPUTS,
    TEST,
    K,
    at_k,
    by_shots,
    chosen_k,
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

    from pimerge.evaluation.schema import ComparisonDocument


@dataclass(frozen=True, kw_only=True)
class ShotsSeries(FigureData):
    """A method: mean and standard deviation at each number of shots that it was run with, None for all."""

    method: str
    control: bool
    shots: list[int | None]
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True, kw_only=True)
class ShotsData(FigureData):
    """The data of the plot; the methods had ``k`` experts of the ranking."""

    target: str
    metric: str
    percent: bool
    k: int
    seeds: int
    series: list[ShotsSeries]


def collect(comparison: ComparisonDocument, inputs: FigureInputs, *, k: int | None) -> ShotsData:
    """Take the lines of one number of experts."""
    k = chosen_k(comparison, k)
    lines = [line for line in comparison.lines if line.test == TEST]
    every = by_shots({line.shots for line in lines})
    if len(every) < 2:
        only = "".join(map(shots_option, every))
        raise PimergeError(
            f"all runs of the comparison have {only} shots, and a curve takes several numbers",
            "run 'pimerge compare --shots 1,5,20 …'",
        )
    series = []
    for method, control in methods(comparison).items():
        own = {line.shots: line for line in at_k(lines, method, k)}
        shots = by_shots(set(own))
        if shots:
            mean, sd = [own[each].mean for each in shots], [own[each].sd for each in shots]
            series.append(ShotsSeries(method=method, control=control, shots=shots, mean=mean, sd=sd))
    return ShotsData(
        target=comparison.target,
        metric=comparison.metric,
        percent=in_percent(comparison),
        k=k,
        seeds=max(line.seeds for line in lines),
        series=series,
    )


def draw(data: ShotsData) -> Drawing:
    """One axis; the numbers of shots stand at equal distances."""
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    every = by_shots({shots for series in data.series for shots in series.shots})
    style = looks({series.method: series.control for series in data.series})
    for series in data.series:
        places = [every.index(shots) for shots in series.shots]
        curve(axes, places, series.mean, series.sd, style[series.method])
    axes.set_xticks(range(len(every)), [shots_option(shots) for shots in every])
    axes.set_xlabel("examples of each class")
    scores_axis(axes, data.metric, data.percent)
    names = short_names([series.method for series in data.series])
    figure.legend(axes.get_lines(), names, loc="outside right upper", title="open markers: controls", alignment="left")
    subtitle(figure, f"{data.target}, k = {data.k} experts at hand; mean ± sd over up to {data.seeds} seeds")
    return figure


FIGURE = Figure(
    name="shots",
    summary="Score by number of examples per class, one line per method with a band of ± one standard deviation.",
    options={K: None},
    data=ShotsData,
    inputs=INPUTS,
    open=open_comparison,
    collect=collect,
    draw=draw,
)
