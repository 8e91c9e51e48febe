"""Score by number of experts, one line per method (π-Tuning, fig. 5).

The data is from ``comparison.json``, at one number of shots. A method that does not depend on the number of experts,
such as most controls, is a horizontal line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureInputs
from pimerge.reporting.figures._comparing import (
    INPUTS,
    SHOTS,
    TEST,
    Curve,
    CurvesData,
    MethodSeries,
    by_shots,
    chosen_shots,
    draw_curves,
    examples_text,
    in_percent,
    methods,
    open_comparison,
    shots_option,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine


@dataclass(frozen=True, kw_only=True)
class ExpertsSeries(MethodSeries):
    """A method: mean and standard deviation at each number of experts; a single number is a horizontal line."""

    k: list[int]
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True, kw_only=True)
class ExpertsData(CurvesData):
    """The data of the plot."""

    shots: int | None
    seeds: int
    series: list[ExpertsSeries]


def collect(comparison: ComparisonDocument, inputs: FigureInputs, *, shots: str | None) -> ExpertsData:
    """Select the lines with one number of shots, by default the least with the most numbers of experts."""
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
    """Return method → how many numbers of experts it has at a number of shots."""
    return Counter(line.method for line in lines if line.shots == shots)


def draw(data: ExpertsData) -> Drawing:
    """Draw the curves over numbers of experts at equal distances."""
    every = sorted({k for series in data.series if len(series.k) > 1 for k in series.k})
    curves = {}
    for each in data.series:
        level = len(each.k) == 1
        places = [0, len(every) - 1] if level else [every.index(k) for k in each.k]
        mean, sd = (values * 2 if level else values for values in (each.mean, each.sd))
        curves[each.method] = Curve(each.control, places, mean, sd, level)
    text = f"{data.target}, {examples_text(data.shots)}; mean ± sd over up to {data.seeds} seeds"
    return draw_curves(data, curves, list(map(str, every)), "experts of the ranking at hand", "thin: controls", text)


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
