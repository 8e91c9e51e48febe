"""Loss and accuracy over the plane through three experts, the target's and two others (π-Tuning, fig. 3c).

Each point is a sum of the three updates with weights that sum to 1; inside the triangle all weights are positive.
Lengths are norms of updates, ‖ΔW‖. The head of the target's expert is used everywhere, and nothing is trained. Weights
given by ``--coefficients``, such as ``tuned/coefficients.json``, differ between modules and lie outside the plane; the
plot shows the nearest point of the plane and the distance to it. A head and factors that were trained besides the
weights are not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import COLOURS, new_figure, shortened, subtitle, title
from pimerge.reporting.figures._study import INPUTS, SAMPLING, AnswerScore, ShownExamples, Study, load_study, open_study

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from numpy.typing import NDArray

    from pimerge.adapters.expert import Expert
    from pimerge.reporting.figures._plane import Plane

    Array = NDArray[np.float64]
    Mark = tuple[str, "MarkKind", Array, float]

GRID = Option("grid", int, "Points per side.", lambda points: points >= 3, "at least 3")
COEFFICIENTS = Option(
    "coefficients", Path, "Also show the weights that a merge or a tuning wrote; repeatable.", repeated=True
)
MARGIN = 0.3

MarkKind = Literal["expert", "uniform", "coefficients"]


@dataclass(frozen=True, kw_only=True)
class MarkedPoint(FigureData):
    """A point with a name: its weights on the three experts, where it lies, and its distance from the plane.

    Attributes:
        off: distance from the plane, relative to the distance from the target's expert.
        score: score of the nearest point of the plane.
    """

    name: str
    kind: MarkKind
    weights: list[float]
    x: float
    y: float
    off: float
    score: AnswerScore


@dataclass(frozen=True, kw_only=True)
class LandscapeData(FigureData):
    """The data of the plot; ``grid`` has a row of points for each of ``y``."""

    shown: ShownExamples
    experts: list[str]
    sha256: list[str]
    x: list[float]
    y: list[float]
    grid: list[list[AnswerScore]]
    marked: list[MarkedPoint]


def collect(
    study: Study, inputs: FigureInputs, *, grid: int, coefficients: tuple[Path, ...], limit: int, seed: int
) -> LandscapeData:
    """Score a grid of points: by default the plane of the target's expert and the two best others."""
    import numpy as np

    from pimerge.reporting.figures._plane import Plane

    three = _three(study, inputs.experts)
    plane = Plane.through(three)
    marks = _marks(plane, three, coefficients)
    corners = np.array([place for _, _, place, _ in marks])
    low, high = corners.min(0), corners.max(0)
    margin = MARGIN * (high - low).max()
    x, y = (np.linspace(low[axis] - margin, high[axis] + margin, grid) for axis in (0, 1))
    places = np.array([[across, up] for up in y for across in x])
    rows = plane.weights(np.concatenate([places, corners]))
    found = load_study(study, inputs, limit, seed)
    with inputs.track("landscape", len(rows), "points") as advance:
        points = list(found.scores(three, rows.tolist(), advance))
    count = len(x)
    return LandscapeData(
        shown=found.shown,
        experts=[expert.name for expert in three],
        sha256=[expert.sha256 for expert in three],
        x=x.tolist(),
        y=y.tolist(),
        grid=[points[start : start + count] for start in range(0, len(places), count)],
        marked=[
            MarkedPoint(name=name, kind=kind, weights=row, x=place[0], y=place[1], off=off, score=score)
            for (name, kind, place, off), row, score in zip(
                marks, rows[len(places) :].tolist(), points[len(places) :], strict=True
            )
        ],
    )


def draw(data: LandscapeData) -> Drawing:
    """Draw contours of the loss on the left and of the accuracy on the right."""
    import numpy as np

    from pimerge.reporting.figures._labels import place_labels

    figure = new_figure(12.0, 5.2)
    panels = figure.subplots(1, 2)
    loss, accuracy = (
        np.array([[getattr(point, what) for point in row] for row in data.grid]) for what in ("loss", "accuracy")
    )
    for axes, values, colours, label in (
        (panels[0], loss, "cividis_r", "loss, nats"),
        (panels[1], 100 * accuracy, "cividis", "accuracy, %"),
    ):
        filled = axes.contourf(data.x, data.y, values, levels=_levels(values), cmap=colours, extend="both")
        figure.colorbar(filled, ax=axes, label=label)
        axes.set_aspect("equal")
        corners = data.marked[:3]
        axes.fill([m.x for m in corners], [m.y for m in corners], fill=False, edgecolor="black", linestyle=":")
        _draw_marks(axes, data)
        title(axes, f"{label.partition(',')[0].capitalize()}")
        axes.set_xlabel("‖ΔW‖ along the first side")
    subtitle(figure, f"The plane through {', '.join(map(shortened, data.experts))}. {data.shown.sentence()}")
    names = [_label(mark) for mark in data.marked]
    for axes in panels:
        place_labels(axes, [(mark.x, mark.y) for mark in data.marked], names)
    return figure


def _three(study: Study, named: tuple[str, ...]) -> list[Expert]:
    if named and len(study.experts) == 3:
        return list(study.experts)
    if len(study.experts) == 2 or (not named and len(study.experts) > 2):
        return [study.target, *study.experts[:2]]
    raise PimergeError(
        f"a plane goes through three experts, and there are {1 + len(study.experts)} with the target's",
        "name two besides the target's, or three: pimerge plot landscape NAME NAME",
    )


def _marks(plane: Plane, three: list[Expert], coefficients: tuple[Path, ...]) -> list[Mark]:
    """Return name, kind, coordinates and distance from the plane for the experts, their mean, and the files."""
    found: list[Mark] = []
    for place, expert in enumerate(three):
        alone = [float(place == other) for other in range(3)]
        found.append((expert.name, "expert", *plane.place(dict.fromkeys(plane.products, alone))))
    found.append(("uniform of the three", "uniform", *plane.place(dict.fromkeys(plane.products, [1 / 3] * 3))))
    found += [
        (path.resolve().parent.name, "coefficients", *plane.place(_weights(path, three))) for path in coefficients
    ]
    return found


def _weights(path: Path, three: list[Expert]) -> dict[str, list[float]]:
    """Read module → weights of the three experts at full strength from a file of coefficients."""
    from pimerge.adapters.writer import Coefficients
    from pimerge.core.documents import parse_document

    content = parse_document(Coefficients, path)
    known = [expert.sha256 for expert in three]
    others = [name for name, sha256 in zip(content.experts, content.sha256, strict=True) if sha256 not in known]
    if others:
        raise PimergeError(
            f"'{path}' also weights {', '.join(others)}, which are not in the plane",
            "name its experts: pimerge plot landscape NAME NAME",
        )
    if not three[0].modules:
        raise PimergeError(f"experts of kind {three[0].kind} have no ΔW to weight", "leave --coefficients out")
    found = {}
    for module, row in content.weights.items():
        weight = dict(zip(content.sha256, (w * s for w, s in zip(row, content.scales, strict=True)), strict=True))
        found[module] = [weight.get(sha256, 0.0) for sha256 in known]
    return found


def _levels(values: Array) -> Array:
    """Return evenly spaced contour levels between quantiles of the values, so that extreme corners do not decide."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    low, high = np.quantile(values, [0.01, 0.97])
    levels: Array = np.asarray(MaxNLocator(12).tick_values(low, high if high > low else low + 1e-3))
    return levels


def _draw_marks(axes: Axes, data: LandscapeData) -> None:
    looks = {"expert": ("o", COLOURS[1]), "uniform": ("D", COLOURS[4]), "coefficients": ("^", COLOURS[3])}
    for mark in data.marked:
        marker, colour = looks[mark.kind]
        axes.plot(mark.x, mark.y, marker=marker, color=colour, markersize=8, markeredgecolor="white", linestyle="none")


def _label(mark: MarkedPoint) -> str:
    name = shortened(mark.name, 24)
    return f"{name} ({mark.off:.0%} off)" if mark.off else name


FIGURE = Figure(
    name="landscape",
    summary="Loss and accuracy over the plane through three experts, the target's and two others (π-Tuning, fig. 3c).",
    options={GRID: 15, COEFFICIENTS: (), **SAMPLING},
    data=LandscapeData,
    inputs=INPUTS,
    open=open_study,
    collect=collect,
    draw=draw,
)
