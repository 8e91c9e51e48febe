"""Accuracy and loss from the target's expert to each other one, in a straight line (π-Tuning, fig. 3a).

    ΔW(α) = (1 − α) · ΔW_t + α · ΔW_j,  α from 0 to 1

with ΔW_t of the target's expert and ΔW_j of another, each at full strength. The head is that of the target's expert
along the whole path, and nothing is trained. Where accuracy in between is above α = 0, the other expert has something
for the target.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from pimerge.core.errors import PimergeError
from pimerge.reporting.figures import Options
from pimerge.reporting.figures._canvas import GREY, look, new_figure, percent, short_names, subtitle, title
from pimerge.reporting.figures._study import Point, Shown, Study, examined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDS = "study"
OPTIONS = ("experts", "step", "limit", "seed")
LEAST_STEP = 0.001
IN_COLOUR = 7


class Path(BaseModel):
    """From the target's expert to another: what the base answers at each α."""

    model_config = ConfigDict(extra="forbid")

    expert: str
    sha256: str
    points: list[Point]

    def best(self) -> int:
        """Where accuracy is highest, first."""
        return max(range(len(self.points)), key=lambda place: self.points[place].accuracy)

    def gain(self) -> float:
        """The highest accuracy on the path above that at α = 0."""
        return self.points[self.best()].accuracy - self.points[0].accuracy

    def least(self) -> int:
        """Where loss is lowest, first."""
        return min(range(len(self.points)), key=lambda place: self.points[place].loss)

    def fall(self) -> float:
        """The lowest loss on the path below that at α = 0."""
        return self.points[0].loss - self.points[self.least()].loss


class Data(BaseModel):
    """What the plot shows; ``left_out`` says which candidates cannot be combined with the target's expert, and why."""

    model_config = ConfigDict(extra="forbid")

    figure: Literal["path"] = "path"
    shown: Shown
    target_sha256: str
    alphas: list[FiniteFloat]
    paths: list[Path]
    left_out: dict[str, str]


def collect(study: Study, options: Options) -> Data:
    """Score every path.

    Raises:
        PimergeError: if the step is out of range, there is no expert to go to, or a score cannot be had.
    """
    alphas = steps(options.step)
    for name, reason in study.left_out.items():
        options.note(f"{name} is left out: {reason}")
    found = examined(study, options)
    paths = []
    with options.track("paths", 1 + len(study.experts) * (len(alphas) - 1), "points") as advance:
        start = list(found.scores([study.target], [[1.0]], advance))  # the same for all
        for expert in study.experts:
            rows = [[1 - alpha, alpha] for alpha in alphas[1:]]
            points = start + list(found.scores([study.target, expert], rows, advance))
            paths.append(Path(expert=expert.name, sha256=expert.sha256, points=points))
    return Data(
        shown=found.shown,
        target_sha256=study.target.sha256,
        alphas=alphas,
        paths=paths,
        left_out=study.left_out,
    )


def steps(step: float) -> list[float]:
    """From 0 to 1.

    Raises:
        PimergeError: if the step does not lie between 0.001 and 1.

    >>> steps(0.4)
    [0.0, 0.4, 0.8, 1.0]
    """
    if not LEAST_STEP <= step <= 1:
        raise PimergeError(f"--step is {step}", f"expected a number from {LEAST_STEP} to 1, such as {Options.step}")
    count = math.ceil(1 / step - 1e-9)
    return [round(place * step, 6) for place in range(count)] + [1.0]


def draw(data: Data) -> Figure:
    """Accuracy on the left, loss on the right; the paths to the lowest losses in colour, the others grey."""
    figure = new_figure(10.5, 4.2)
    accuracy, loss = figure.subplots(1, 2)
    order = sorted(range(len(data.paths)), key=lambda place: (-data.paths[place].fall(), -data.paths[place].gain()))
    names = short_names([path.expert for path in data.paths])
    every = max(1, (len(data.alphas) - 1) // 5)
    handles, labels = [], []
    for rank, place in reversed(list(enumerate(order))):  # the best on top
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
