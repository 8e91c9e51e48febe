"""Render a report as one self-contained HTML file, which needs neither the network nor other files."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path

from pimerge.core.errors import PimergeError
from pimerge.reporting.report.document import Picture, Report

HERE = Path(__file__).parent
LARGEST = 5_000_000
LARGEST_SVG = 700_000  # a larger one is replaced by the PNG, if that exists and is smaller
ROOM_FOR_PICTURES = 4_000_000
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def page(report: Report, folder: Path) -> str:
    """Render the HTML page.

    Names and texts are escaped. A Content-Security-Policy lets the browser use only the styles, the script and the
    pictures that are part of the page.

    Args:
        folder: the folder of the pictures.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    styles, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    text = environment.get_template("report.html.j2").render(
        report=report,
        styles=styles,
        script=script,
        styles_hash=_hash(styles),
        script_hash=_hash(script),
        sources=_sources(report, folder),
    )
    if len(text.encode()) >= LARGEST:
        raise PimergeError(
            f"the report has {len(text.encode()) / 1e6:.1f} MB; the limit is {LARGEST / 1e6:g} MB",
            "move some of the plots or outputs out of the folder",
        )
    return text


def _sources(report: Report, folder: Path) -> dict[str, str]:
    """Map the file of each picture to a data URI, until the room is used up."""
    found: dict[str, str] = {}
    room = ROOM_FOR_PICTURES
    for picture in (picture for section in report.sections for picture in section.pictures):
        source = _data_uri(_smaller(picture, folder))
        if len(source) <= room:
            found[picture.file] = source
            room -= len(source)
    return found


def _smaller(picture: Picture, folder: Path) -> Path:
    path = folder / picture.file
    other = path.with_suffix(".png")
    size = path.stat().st_size
    return other if size > LARGEST_SVG and other.is_file() and other.stat().st_size < size else path


def _data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PimergeError(f"cannot read '{path}': {error.strerror}") from error
    return f"data:{_TYPES[path.suffix]};base64,{b64encode(content).decode()}"


def _hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy identifies an inline style or script."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
