"""Scores of the ranking against what the other experts gave on the way (π-Tuning, fig. 3b).

The gain of an expert is the highest accuracy on its path above that of the target's expert alone (α = 0), and as much
lower the loss can get. If the ranking is right, the points rise from left to right. An accuracy has a standard error
of its own, which the plot says; the loss tells small gains better.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from pimerge.core.errors import PimergeError
from pimerge.reporting.figures import Options
from pimerge.reporting.figures._canvas import COLOURS, new_figure, short_names, subtitle, title
from pimerge.reporting.figures._labels import place_labels
from pimerge.reporting.figures.path import Data as Paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pimerge.adapters.ranking_document import Ranking

NEEDS = "path"
OPTIONS = ()
LEAST = 3


class Point(BaseModel):
    """An expert: its score in the ranking, its gains in accuracy and in loss, and the α of each."""

    model_config = ConfigDict(extra="forbid")

    expert: str
    score: FiniteFloat
    accuracy: FiniteFloat
    accuracy_alpha: FiniteFloat
    loss: FiniteFloat
    loss_alpha: FiniteFloat


class Correlation(BaseModel):
    """Of the scores with a gain; None for fewer than three points, or where one side is constant."""

    model_config = ConfigDict(extra="forbid")

    pearson: FiniteFloat | None
    spearman: FiniteFloat | None

    def sentence(self) -> str:
        """For a title."""
        if self.pearson is None or self.spearman is None:
            return "no correlation can be had"
        return f"Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"


class Data(BaseModel):
    """What the plot shows; ``error`` is one standard error of the accuracy at α = 0."""

    model_config = ConfigDict(extra="forbid")

    figure: Literal["gain"] = "gain"
    target: str
    measure: str
    examples: int
    error: FiniteFloat
    points: list[Point]
    accuracy: Correlation
    loss: Correlation


def collect(source: tuple[Ranking, Paths], options: Options) -> Data:
    """Join a ranking with the paths, by the experts' tensors.

    Raises:
        PimergeError: if the paths are those of another target, or the two have no expert in common.
    """
    ranking, paths = source
    if ranking.target.sha256 != paths.target_sha256:
        same = " as it is now" if paths.shown.target == ranking.target.name else ""
        raise PimergeError(
            f"the paths are those of '{paths.shown.target}', the ranking is for '{ranking.target.name}'{same}",
            "run 'pimerge plot path --force' again",
        )
    scores = {candidate.sha256: candidate.score for candidate in ranking.candidates}
    points = [
        Point(
            expert=path.expert,
            score=scores[path.sha256],
            accuracy=path.gain(),
            accuracy_alpha=paths.alphas[path.best()],
            loss=path.fall(),
            loss_alpha=paths.alphas[path.least()],
        )
        for path in paths.paths
        if path.sha256 in scores
    ]
    if not points:
        raise PimergeError(
            "the ranking has none of the experts that the paths lead to", "run 'pimerge plot path --force' again"
        )
    start = paths.paths[0].points[0].accuracy
    return Data(
        target=ranking.target.name,
        measure=ranking.measure,
        examples=paths.shown.examples,
        error=math.sqrt(start * (1 - start) / paths.shown.examples),
        points=points,
        accuracy=_correlation([point.score for point in points], [point.accuracy for point in points]),
        loss=_correlation([point.score for point in points], [point.loss for point in points]),
    )


def draw(data: Data) -> Figure:
    """A point for each expert, with its name: gain in accuracy on the left, in loss on the right."""
    figure = new_figure(11.5, 5.0)
    panels = figure.subplots(1, 2)
    scores = [point.score for point in data.points]
    names = short_names([point.expert for point in data.points], 24)
    gains = [[100 * point.accuracy for point in data.points], [point.loss for point in data.points]]
    labels = ("gain in accuracy, points", "fall of the loss, nats")
    for axes, values, label, known in zip(panels, gains, labels, (data.accuracy, data.loss), strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        axes.plot(scores, values, linestyle="none", marker="o", markersize=5, color=COLOURS[0])
        axes.margins(0.16, 0.12)
        axes.set_xlabel(f"score of the ranking ({data.measure})")
        axes.set_ylabel(label)
        title(axes, f"{known.sentence()}, n = {len(data.points)}")
    subtitle(
        figure,
        f"{data.examples} test examples of {data.target}; one standard error of an accuracy is "
        f"{100 * data.error:.1f} points",
    )
    for axes, values in zip(panels, gains, strict=True):  # last: it needs the places of all else
        place_labels(axes, list(zip(scores, values, strict=True)), names)
    return figure


def _correlation(scores: list[float], gains: list[float]) -> Correlation:
    from scipy.stats import pearsonr, spearmanr

    if len(scores) < LEAST or len(set(scores)) == 1 or len(set(gains)) == 1:
        return Correlation(pearson=None, spearman=None)
    return Correlation(
        pearson=float(pearsonr(scores, gains).statistic), spearman=float(spearmanr(scores, gains).statistic)
    )
