"""Scores of the ranking against the best accuracy on each expert's path (π-Tuning, fig. 3b).

The gain of an expert is the highest accuracy on its path minus the accuracy of the target's expert alone (α = 0), and
likewise the decrease of the loss. If the ranking is right, the points rise from left to right. The plot states the
standard error of an accuracy; the loss shows small gains more clearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import COLOURS, new_figure, short_names, subtitle, title
from pimerge.reporting.figures.path import FIGURE as PATHS
from pimerge.reporting.figures.path import PathData

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from pimerge.adapters.ranking_document import Ranking

LEAST = 3


@dataclass(frozen=True, kw_only=True)
class GainPoint(FigureData):
    """An expert: its score in the ranking, its gains in accuracy and in loss, and the α of each."""

    expert: str
    score: float
    accuracy: float
    accuracy_alpha: float
    loss: float
    loss_alpha: float


@dataclass(frozen=True, kw_only=True)
class Correlation(FigureData):
    """Correlation of the scores with a gain; None for fewer than three points, or if one side is constant."""

    pearson: float | None
    spearman: float | None

    def sentence(self) -> str:
        """Describe the correlation for a title."""
        if self.pearson is None or self.spearman is None:
            return "no correlation can be had"
        return f"Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"


@dataclass(frozen=True, kw_only=True)
class GainData(FigureData):
    """The data of the plot; ``error`` is one standard error of the accuracy at α = 0."""

    target: str
    measure: str
    examples: int
    error: float
    points: list[GainPoint]
    accuracy: Correlation
    loss: Correlation


def open_paths(inputs: FigureInputs) -> tuple[Ranking, PathData]:
    """Read the ranking and the data of the figure ``path``."""
    from pimerge.adapters.ranking_document import read_ranking

    if not inputs.path.is_file():
        raise PimergeError(f"there is no '{inputs.path}'", f"run 'pimerge plot {PATHS.name}' first, which writes it")
    return read_ranking(inputs.ranking), PATHS.read(inputs.path)


def collect(source: tuple[Ranking, PathData], inputs: FigureInputs) -> GainData:
    """Join the ranking with the paths by the hashes of the experts."""
    ranking, paths = source
    if ranking.target.sha256 != paths.target_sha256:
        same = ", which has changed since" if paths.shown.target == ranking.target.name else ""
        raise PimergeError(
            f"the paths are for '{paths.shown.target}', the ranking is for '{ranking.target.name}'{same}",
            "run 'pimerge plot path --force' again",
        )
    scores = {candidate.sha256: candidate.score for candidate in ranking.candidates}
    points = [
        GainPoint(
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
        raise PimergeError("the ranking has none of the experts of the paths", "run 'pimerge plot path --force' again")
    start = paths.paths[0].points[0].accuracy
    return GainData(
        target=ranking.target.name,
        measure=ranking.measure,
        examples=paths.shown.examples,
        error=math.sqrt(start * (1 - start) / paths.shown.examples),
        points=points,
        accuracy=_correlation([point.score for point in points], [point.accuracy for point in points]),
        loss=_correlation([point.score for point in points], [point.loss for point in points]),
    )


def draw(data: GainData) -> Drawing:
    """Draw a named point for each expert: gain in accuracy on the left, in loss on the right."""
    from pimerge.reporting.figures._labels import place_labels

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
    for axes, values in zip(panels, gains, strict=True):  # last, since it needs the final layout
        place_labels(axes, list(zip(scores, values, strict=True)), names)
    return figure


def _correlation(scores: list[float], gains: list[float]) -> Correlation:
    from scipy.stats import pearsonr, spearmanr

    if len(scores) < LEAST or len(set(scores)) == 1 or len(set(gains)) == 1:
        return Correlation(pearson=None, spearman=None)
    return Correlation(
        pearson=float(pearsonr(scores, gains).statistic), spearman=float(spearmanr(scores, gains).statistic)
    )


FIGURE = Figure(
    name="gain",
    summary="Scores of the ranking against the best accuracy on each expert's path (π-Tuning, fig. 3b).",
    data=GainData,
    inputs=("ranking", "path"),
    open=open_paths,
    collect=collect,
    draw=draw,
)
