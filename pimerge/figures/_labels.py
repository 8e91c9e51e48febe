"""Names beside points, none over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_ANGLES = (0, 180, 90, 270, 35, 145, 215, 325)
_SIDES = (0, 180)
_DISTANCES = (7, 14, 24, 36, 50, 66, 84)


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], size: float = 7.5) -> None:
    """Write each name at the nearest free place around its point, with a line to it if that is not at its side.

    A name for which there is no free place goes where it covers least. The axes' limits must be final.
    """
    from matplotlib.patheffects import withStroke

    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()  # the layout decides what covers what
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    taken: list[Bbox] = [_around(x, y, 4 * scale) for x, y in pixels]
    frame = axes.get_window_extent(renderer)
    for (x, y), point, name in zip(pixels, points, names, strict=True):
        text = axes.annotate(name, point, fontsize=size)
        box = text.get_window_extent(renderer)
        text.remove()
        best, least = (0.0, 0.0), math.inf
        for distance in _DISTANCES:
            for angle in _ANGLES:
                offset = _offset(box, angle, distance * scale)
                moved = box.translated(x + offset[0] - box.x0, y + offset[1] - box.y0)
                outside = _area(moved) - _overlap(moved, frame)
                covered = outside + sum(_overlap(moved, other) for other in taken)
                if covered < least - 1e-6:
                    best, least, chosen = offset, covered, moved
                    beside = angle in _SIDES and distance == _DISTANCES[0]
            if least <= 0:
                break
        taken.append(chosen.padded(2 * scale))
        arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            name,
            point,
            xytext=(best[0] / scale, best[1] / scale),
            textcoords="offset points",
            fontsize=size,
            arrowprops=None if beside else arrow,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # to be read on any ground
        )


def _offset(box: Bbox, angle: float, distance: float) -> tuple[float, float]:
    """Of the text's lower left corner from the point, in pixels, so that its nearest side is at a distance."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    width, height = box.width, box.height
    return distance * cos - width * (1 - cos) / 2, distance * sin - height * (1 - sin) / 2


def _around(x: float, y: float, radius: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))
