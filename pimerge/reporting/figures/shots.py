"""Score by number of examples per class, one line per method with a band of ± one standard deviation.

The data is from ``comparison.json``; the deviation is over seeds, each with its own sample of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureInputs
from pimerge.reporting.figures._comparing import (
    INPUTS,
    TEST,
    Curve,
    CurvesData,
    K,
    MethodSeries,
    at_k,
    by_shots,
    chosen_k,
    draw_curves,
    in_percent,
    methods,
    open_comparison,
    shots_option,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.evaluation.schema import ComparisonDocument


@dataclass(frozen=True, kw_only=True)
class ShotsSeries(MethodSeries):
    """A method: mean and standard deviation at each of its numbers of shots, None for all examples."""

    shots: list[int | None]
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True, kw_only=True)
class ShotsData(CurvesData):
    """The data of the plot; the methods had ``k`` experts of the ranking."""

    k: int
    seeds: int
    series: list[ShotsSeries]


def collect(comparison: ComparisonDocument, inputs: FigureInputs, *, k: int | None) -> ShotsData:
    """Select the lines with one number of experts."""
    k = chosen_k(comparison, k)
    lines = [line for line in comparison.lines if line.test == TEST]
    every = by_shots({line.shots for line in lines})
    if len(every) < 2:
        only = "".join(map(shots_option, every))
        raise PimergeError(
            f"all runs of the comparison have {only} shots, and a curve needs several numbers",
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
    """Draw the curves over numbers of shots at equal distances."""
    every = by_shots({shots for series in data.series for shots in series.shots})
    curves = {
        each.method: Curve(each.control, [every.index(n) for n in each.shots], each.mean, each.sd)
        for each in data.series
    }
    text = f"{data.target}, k = {data.k} experts at hand; mean ± sd over up to {data.seeds} seeds"
    ticks = [shots_option(shots) for shots in every]
    return draw_curves(data, curves, ticks, "examples of each class", "open markers: controls", text)


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
