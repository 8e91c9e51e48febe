"""Code shared by all plots: size, colours that colour-blind people can tell apart, reproducible files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.transforms import Bbox, BboxBase

# the palette of Okabe and Ito (2008) without yellow, which is too faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#999999"
LIBRARIES = ("matplotlib", "networkx", "scipy")
LONGEST = 30
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 150,  # the resolution of the PNG, so that the layout fits it
    "svg.hashsalt": "pimerge",
    "text.hinting": "none",  # makes widths proportional to the size
    "text.parse_math": False,  # names may contain dollar signs
}


def require_libraries() -> None:
    """Check that the plotting libraries are installed."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise PimergeError(
            f"plots need {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed",
            "pip install 'pimerge[plots]'",
        )


@contextmanager
def style() -> Iterator[None]:
    """Use matplotlib's defaults and the style of the plots during the block, regardless of the user's settings."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def pictures(draw: Callable[[], Drawing]) -> dict[str, bytes]:
    """Return suffix → content of the picture's files, the same bytes for the same figure."""
    found = {}
    with style():
        figure = draw()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is computed once for both files
        _round_places(figure)
        # include everything beside the axes, since names have any length
        frame = _rounded(figure.get_tightbbox().padded(0.15))
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], metadata=metadata, bbox_inches=frame)
            found[suffix] = buffer.getvalue()
    return found


def _round_places(figure: Drawing) -> None:
    """Round the places of the axes.

    The solver of the layout gives other last digits in every process, and an SVG names its parts by hashes of places.
    """
    for axes in figure.axes:
        for which in ("original", "active"):
            inside = axes.get_in_layout()
            axes.set_position(_rounded(axes.get_position(original=which == "original")), which)
            axes.set_in_layout(inside)  # which set_position changes


def _rounded(box: BboxBase) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox(box.get_points().round(6))


def new_figure(width: float, height: float) -> Drawing:
    """Create an empty figure of a size in inches, independent of windows and of global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def look(place: int) -> dict[str, Any]:
    """Return colour, marker and line style of the n-th item; after seven they repeat in other combinations.

    >>> look(0)["color"], look(7)["color"], look(7)["marker"]
    ('#0072B2', '#0072B2', 's')
    """
    turn, at = divmod(place, len(COLOURS))
    shifted = (at + turn) % len(COLOURS)
    return {"color": COLOURS[at], "marker": MARKERS[shifted], "linestyle": DASHES[shifted]}


def title(axes: Axes, text: str, width: int = 60) -> None:
    """Set a title, wrapped into lines."""
    axes.set_title("\n".join(textwrap.wrap(text, width)))


def subtitle(figure: Drawing, text: str) -> None:
    """Set a title above all axes, wrapped so that there is room for a legend on the right."""
    width = int(12 * (figure.get_figwidth() - 2.2))
    figure.suptitle("\n".join(textwrap.wrap(text, width)), x=0.01, ha="left", fontsize=9, color="0.3")


def shortened(name: str, longest: int = LONGEST) -> str:
    """Shorten a long name by its middle, and replace line breaks by spaces.

    >>> shortened("an-expert-of-a-very-long-name", 15)
    'an-expe…ng-name'
    """
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[: longest - 1 - half]}…{name[len(name) - half :]}"


def short_names(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Shorten names by :func:`shortened`, except names that would then look the same."""
    short = [shortened(name, longest) for name in names]
    return [each if short.count(each) == 1 else name for each, name in zip(short, names, strict=True)]


def percent(axes: Axes) -> None:
    """Show fractions as percentages on the vertical axis."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
