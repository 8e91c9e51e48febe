"""How much each method loses on other test sets than the target's own (π-Tuning, fig. 4).

The plot shows, from ``comparison.json``, the score on the target's test split minus the score on each other test set,
as mean ± one standard deviation over the seeds. A method further to the left is more robust to a shift of the data.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import look, new_figure, short_names, subtitle
from pimerge.reporting.figures._comparing import (
    INPUTS,
    SHOTS,
    TEST,
    K,
    at_k,
    by_shots,
    chosen_k,
    chosen_shots,
    examples_text,
    in_percent,
    methods,
    open_comparison,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.evaluation.schema import ComparisonDocument


@dataclass(frozen=True, kw_only=True)
class Drop(FigureData):
    """The mean score on one test set, and the mean and standard deviation of its drop from the target's own."""

    test: str
    score: float
    drop: float
    sd: float


@dataclass(frozen=True, kw_only=True)
class MethodShift(FigureData):
    """A method's mean score on the target's test split, and its drops."""

    method: str
    control: bool
    score: float
    seeds: int
    drops: list[Drop]


@dataclass(frozen=True, kw_only=True)
class ShiftData(FigureData):
    """The data of the plot."""

    target: str
    metric: str
    percent: bool
    shots: int | None
    k: int
    tests: list[str]
    methods: list[MethodShift]


def collect(comparison: ComparisonDocument, inputs: FigureInputs, *, k: int | None, shots: str | None) -> ShiftData:
    """Take the runs of one number of experts and of shots: by default the most."""
    tests = list(dict.fromkeys(test for run in comparison.runs for test in run.scores if test != TEST))
    if not tests:
        raise PimergeError(
            "the comparison has scores of the target's own test split alone",
            "run 'pimerge compare --also-test FOLDER …' with another test set of the same classes",
        )
    k = chosen_k(comparison, k)
    every = by_shots({run.shots for run in comparison.runs})
    number = chosen_shots(comparison, shots, every[-1])
    found = []
    for method, control in methods(comparison).items():
        runs = [run for run in at_k(comparison.runs, method, k) if run.shots == number and TEST in run.scores]
        drops = []
        for test in tests:
            pairs = [(run.scores[TEST], run.scores[test]) for run in runs if test in run.scores]
            if pairs:
                lost = [own - other for own, other in pairs]
                drops.append(
                    Drop(
                        test=test,
                        score=statistics.fmean(other for _, other in pairs),
                        drop=statistics.fmean(lost),
                        sd=statistics.stdev(lost) if len(lost) > 1 else 0.0,
                    )
                )
        if drops:
            score = statistics.fmean(run.scores[TEST] for run in runs)
            found.append(MethodShift(method=method, control=control, score=score, seeds=len(runs), drops=drops))
    if not found:
        raise PimergeError("no run was scored on a test set besides the target's own", "pass another --shots or -k")
    return ShiftData(
        target=comparison.target,
        metric=comparison.metric,
        percent=in_percent(comparison),
        shots=number,
        k=k,
        tests=tests,
        methods=found,
    )


def draw(data: ShiftData) -> Drawing:
    """Draw a row per method with a marker per test set."""
    figure = new_figure(8.0, 1.5 + (0.26 + 0.1 * len(data.tests)) * len(data.methods))
    axes = figure.subplots()
    unit = 100 if data.percent else 1
    handles: list[Any] = []
    for place, test in enumerate(data.tests):
        rows = [(row, drop) for row, each in enumerate(data.methods) for drop in each.drops if drop.test == test]
        offset = (place - (len(data.tests) - 1) / 2) * 0.6 / len(data.tests)
        handles.append(
            axes.errorbar(
                [unit * drop.drop for _, drop in rows],
                [row + offset for row, _ in rows],
                xerr=[unit * drop.sd for _, drop in rows],
                **{**look(place), "linestyle": "none"},
                markersize=5.5,
                elinewidth=1,
            )
        )
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    names = short_names([each.method for each in data.methods])
    marks = [" (control)" if each.control else "" for each in data.methods]
    labels = [
        f"{name}{mark}  {each.score:.1%}" if data.percent else f"{name}{mark}  {each.score:.3g}"
        for name, mark, each in zip(names, marks, data.methods, strict=True)
    ]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    points = "points" if data.percent else data.metric
    axes.set_xlabel(f"{data.metric} on the target's own test split less that on the other, {points}")
    figure.legend(handles, short_names(data.tests), loc="outside right upper", title="test set", alignment="left")
    text = f"{data.target}, {examples_text(data.shots)}, k = {data.k} experts at hand"
    subtitle(figure, f"{text}; mean ± sd over seeds, score on its own test")
    return figure


FIGURE = Figure(
    name="shift",
    summary="How much each method loses on other test sets than the target's own (π-Tuning, fig. 4).",
    options={K: None, SHOTS: None},
    data=ShiftData,
    inputs=INPUTS,
    open=open_comparison,
    collect=collect,
    draw=draw,
)
