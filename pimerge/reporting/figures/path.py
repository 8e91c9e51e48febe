"""Accuracy and loss from the target's expert to each other one, in a straight line (π-Tuning, fig. 3a).

    ΔW(α) = (1 − α) · ΔW_t + α · ΔW_j,  α from 0 to 1

with ΔW_t of the target's expert and ΔW_j of another, each at full strength. The head of the target's expert is used
along the whole path, and nothing is trained. If the accuracy exceeds its value at α = 0, the other expert
helps the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import GREY, look, new_figure, percent, short_names, subtitle, title
from pimerge.reporting.figures._study import INPUTS, SAMPLING, AnswerScore, ShownExamples, Study, load_study, open_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

STEP = Option(
    "step", float, "Distance from one α to the next.", lambda step: 0.001 <= step <= 1, "from 0.001 to 1, such as 0.05"
)
IN_COLOUR = 7


@dataclass(frozen=True, kw_only=True)
class ExpertPath(FigureData):
    """The path from the target's expert to another one, with the score at each α."""

    expert: str
    sha256: str
    points: list[AnswerScore]

    def best(self) -> int:
        """Return the first index with the highest accuracy."""
        return max(range(len(self.points)), key=lambda place: self.points[place].accuracy)

    def gain(self) -> float:
        """Return the highest accuracy on the path minus the accuracy at α = 0."""
        return self.points[self.best()].accuracy - self.points[0].accuracy

    def least(self) -> int:
        """Return the first index with the lowest loss."""
        return min(range(len(self.points)), key=lambda place: self.points[place].loss)

    def fall(self) -> float:
        """Return the loss at α = 0 minus the lowest loss on the path."""
        return self.points[0].loss - self.points[self.least()].loss


@dataclass(frozen=True, kw_only=True)
class PathData(FigureData):
    """The data of the plot; ``left_out`` says which candidates cannot be combined with the target's expert, and why."""

    shown: ShownExamples
    target_sha256: str
    alphas: list[float]
    paths: list[ExpertPath]
    left_out: dict[str, str]


def collect(study: Study, inputs: FigureInputs, *, step: float, limit: int, seed: int) -> PathData:
    """Score every path."""
    alphas = steps(step)
    for name, reason in study.left_out.items():
        inputs.note(f"{name} is left out: {reason}")
    found = load_study(study, inputs, limit, seed)
    paths = []
    with inputs.track("paths", 1 + len(study.experts) * (len(alphas) - 1), "points") as advance:
        start = list(found.scores([study.target], [[1.0]], advance))  # the same for all
        for expert in study.experts:
            rows = [[1 - alpha, alpha] for alpha in alphas[1:]]
            points = start + list(found.scores([study.target, expert], rows, advance))
            paths.append(ExpertPath(expert=expert.name, sha256=expert.sha256, points=points))
    return PathData(
        shown=found.shown, target_sha256=study.target.sha256, alphas=alphas, paths=paths, left_out=study.left_out
    )


def steps(step: float) -> list[float]:
    """Return every α from 0 to 1.

    >>> steps(0.4)
    [0.0, 0.4, 0.8, 1.0]
    """
    count = math.ceil(1 / step - 1e-9)
    return [round(place * step, 6) for place in range(count)] + [1.0]


def draw(data: PathData) -> Drawing:
    """Draw accuracy on the left and loss on the right, with the paths to the lowest losses in colour."""
    figure = new_figure(10.5, 4.2)
    accuracy, loss = figure.subplots(1, 2)
    order = sorted(range(len(data.paths)), key=lambda place: (-data.paths[place].fall(), -data.paths[place].gain()))
    names = short_names([path.expert for path in data.paths])
    every = max(1, (len(data.alphas) - 1) // 5)
    handles, labels = [], []
    for rank, place in reversed(list(enumerate(order))):  # the best is drawn on top
        points = data.paths[place].points
        style = (
            {**look(rank), "markevery": every} if rank < IN_COLOUR else {"color": GREY, "linewidth": 0.7, "alpha": 0.8}
        )
        (line,) = accuracy.plot(data.alphas, [point.accuracy for point in points], markersize=4.5, **style)
        loss.plot(data.alphas, [point.loss for point in points], markersize=4.5, **style)
        if rank <= IN_COLOUR:  # one grey line stands for all of them
            handles.append(line)
            others = len(order) - IN_COLOUR
            grey = f"{others} others" if others > 1 else names[place]
            labels.append(names[place] if rank < IN_COLOUR else grey)
    for axes, start in ((accuracy, data.paths[0].points[0].accuracy), (loss, data.paths[0].points[0].loss)):
        axes.axhline(start, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlim(0, 1)
        axes.set_xlabel("α   (0: the target's expert, 1: the other)")
    percent(accuracy)
    title(accuracy, "Accuracy")
    title(loss, "Loss, −log p(y|x) in nats")
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title="lowest loss first", alignment="left")
    subtitle(figure, f"(1 − α)·ΔW of the target + α·ΔW of the other. {data.shown.sentence()}")
    return figure


FIGURE = Figure(
    name="path",
    summary="Accuracy and loss from the target's expert to each other one, in a straight line (π-Tuning, fig. 3a).",
    options={STEP: 0.05, **SAMPLING},
    data=PathData,
    inputs=INPUTS,
    open=open_study,
    collect=collect,
    draw=draw,
)
