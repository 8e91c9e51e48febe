"""Place names beside points without overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_SIDES = (0, 180)
_ANGLES = (*_SIDES, 90, 270, 35, 145, 215, 325)
_DISTANCES = (7, 14, 24, 36, 50, 66, 84)
_POINT, _AROUND = 4, 2  # clearance around a point and around a name, in points


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], size: float = 7.5) -> None:
    """Write each name at the nearest free place around its point, with a line to the point unless it is beside it.

    Without a free place, a name is put where it overlaps least. The limits of the axes must be final.
    """
    from matplotlib.patheffects import withStroke

    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()  # computes the layout
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    frame = np.array(axes.get_window_extent(renderer).extents)
    pixels = axes.transData.transform(points)
    taken = np.hstack([pixels - _POINT * scale, pixels + _POINT * scale])
    for pixel, point, name in zip(pixels, points, names, strict=True):
        text = axes.annotate(name, point, fontsize=size)
        box = text.get_window_extent(renderer)
        text.remove()
        offsets = scale * _offsets(box.width / scale, box.height / scale)
        boxes = np.hstack([pixel + offsets, pixel + offsets + (box.width, box.height)])
        outside = box.width * box.height - _overlaps(boxes, frame[None])[:, 0]
        chosen = int(np.argmin((outside + _overlaps(boxes, taken).sum(1)).round(3)))  # the first of equal places
        taken = np.vstack([taken, boxes[chosen] + scale * _AROUND * np.array([-1, -1, 1, 1])])
        arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            name,
            point,
            xytext=tuple(offsets[chosen] / scale),
            textcoords="offset points",
            fontsize=size,
            arrowprops=None if chosen < len(_SIDES) else arrow,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # readable on any background
        )


def _offsets(width: float, height: float) -> Array:
    """Return offsets of a text's lower left corner from its point (places × 2), the best places first."""
    angles, distances = np.deg2rad(np.tile(_ANGLES, len(_DISTANCES))), np.repeat(_DISTANCES, len(_ANGLES))
    cos, sin = np.cos(angles), np.sin(angles)
    found: Array = np.column_stack([distances * cos - width * (1 - cos) / 2, distances * sin - height * (1 - sin) / 2])
    return found


def _overlaps(boxes: Array, others: Array) -> Array:
    """Return (n × m) areas of the overlaps of n boxes (x0, y0, x1, y1) with m others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared: Array = np.maximum(high - low, 0).prod(-1)
    return shared
