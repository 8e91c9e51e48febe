"""What a picture has to keep to: no text over another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.axis import Tick
from matplotlib.text import Text

from pimerge.core.files import json_text
from pimerge.reporting.figure import Figure
from pimerge.reporting.figures._canvas import style

LONG = "an-expert-with-a-really-long-name-that-nobody-would-type-twice"
ODD = ["_hidden", "a$b$c", "<b>bold</b>", "zwei\nzeilen", LONG + "-1", LONG + "-2", "ß∂ƒ"]


def names(count: int) -> list[str]:
    """Names that are hard on a picture."""
    return (ODD + [f"expert-{place}" for place in range(count)])[:count]


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Texts of a figure that cover each other by more than a pixel or two."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    axes = [axis for each in figure.axes if each.axison for axis in (each.xaxis, each.yaxis)]
    shown = {id(text) for axis in axes for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
    ticks = {id(text) for each in figure.findobj(Tick) for text in (each.label1, each.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if id(text) in shown or id(text) not in ticks]  # a tick outside is not drawn
    boxes = [
        (text.get_text(), Text.get_window_extent(text, renderer).extents.tolist()) for text in texts
    ]  # without its arrow
    found = []
    for (one, a), (other, b) in combinations(boxes, 2):
        width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        if width > 3 and height > 3:
            found.append((one, other))
    return found


def assert_good(figure: Figure[Any, Any], data: Any, contains: list[str] | None = None) -> None:
    """A figure and its data: no overlaps, the names are there, and the data can be read again."""
    with style():
        drawn = figure.draw(data)
        covered = overlaps(drawn)
        assert not covered, covered
        texts = [text.get_text() for text in drawn.findobj(Text)]
        assert all(any(name in text for text in texts) for name in contains or [])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        file.write_text(json_text(figure.document(data)))
        assert figure.read(file) == data
