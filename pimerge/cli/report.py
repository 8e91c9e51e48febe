"""``pimerge report``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with the outputs of the other commands.")] = Path(),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write. Default: report.html in the folder.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Summarise a folder in one HTML page.

    The page shows the pool, rankings, outputs, scores, comparisons and plots, and names the command for each missing
    part. It needs no other file and no network. Click a column heading to sort a table.
    """
    from pimerge.core.files import output_lock, write_file
    from pimerge.core.replacing import require_same_or_absent
    from pimerge.reporting.report.gathering import gather
    from pimerge.reporting.report.page import page

    path = output or folder / "report.html"
    with output_lock(path, partial(note, quiet=quiet)):
        found = gather(folder)
        content = page(found, folder)
        require_same_or_absent(path, content, force)
        write_file(path, content)
    if json:
        print_json(found.model_dump())
    for section in found.sections:
        for problem in section.problems:
            note(problem, quiet)
    note(f"→ {path}", quiet)
