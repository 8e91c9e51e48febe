"""Print results on standard output, and progress and hints on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pimerge.core.errors import AlreadyDone, PimergeError
from pimerge.core.plugins import Family
from pimerge.core.progress import Advance, Track, silent
from pimerge.core.shown import cleaned, json_cleaned, one_line

_WIDE = 10_000  # off a terminal, no line is cut


def stdout() -> Console:
    """Return the console for results."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def stderr() -> Console:
    """Return the console for progress, hints and errors."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE, highlight=False)


def note(message: str, quiet: bool) -> None:
    """Print a hint on standard error, unless quiet."""
    if not quiet:
        stderr().print(escape(cleaned(message)), style="dim")


@contextmanager
def done_before(as_json: bool, quiet: bool) -> Iterator[None]:
    """End the command with status 0 if its output is there already, from an earlier run of the same command."""
    try:
        yield
    except AlreadyDone as done:
        if as_json:
            print_json(done.document)
        note(str(done), quiet)
        raise typer.Exit from None


def warn(message: str) -> None:
    """Print a warning on standard error, even if quiet."""
    console = stderr()
    console.print("[bold yellow]warning:[/] ", end="")
    console.print(cleaned(message), markup=False)


def show_error(error: PimergeError) -> None:
    """Print an error on standard error."""
    console = stderr()
    console.print("[bold red]error:[/] ", end="")
    lines = [cleaned(error.heading)] if error.heading else []
    for problem in error.problems:
        message = cleaned(problem.message).replace("\n", "\n    ")  # no part of a name looks like a hint
        lines.append(f"- {message}" if error.heading else message)
        if problem.hint:
            lines.append(f"  → {cleaned(problem.hint)}")
    console.print("\n".join(lines), markup=False)


def print_json(document: Any) -> None:
    """Print the result of a command as one JSON document."""
    plain = "utf" not in (sys.stdout.encoding or "utf-8").lower()  # every encoding of output has ASCII
    sys.stdout.write(json_cleaned(json.dumps(document, indent=2, ensure_ascii=plain, allow_nan=False)) + "\n")


def print_line(text: str) -> None:
    """Print one line of the result."""
    stdout().print(escape(cleaned(text)))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table.

    Args:
        right: columns to align on the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cleaned(cell)) for cell in row))
    stdout().print(table)


def print_family(family: Family[Any], as_json: bool) -> None:
    """List the strategies of a family with their formulas, sources and options."""
    if as_json:
        fields = ("name", "summary", "formula", "paper")
        print_json([{**{key: getattr(each, key) for key in fields}, "options": each.defaults} for each in family])
        return
    rows = []
    for strategy in family:
        options = " ".join(f"{option.flag} {value}" for option, value in strategy.options.items())
        rows.append([strategy.name, strategy.summary, strategy.formula, strategy.paper, options])
    print_table(["method", "what it does", "formula", "source", "options"], rows)


def size_text(count: float) -> str:
    """Format a number of bytes.

    >>> size_text(1234567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def tracker(quiet: bool) -> Track:
    """Return what shows progress bars on standard error; nothing is shown if quiet or off a terminal."""
    return silent if quiet or not sys.stderr.isatty() else _bar


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), speed)
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=stderr()) as progress:
        task = progress.add_task(escape(one_line(description)), total=total, note="", speed="")

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(task, advance=steps, note=escape(one_line(note)))
            speed = progress.tasks[task].speed
            if speed:
                progress.update(task, speed=f"{speed:.1f} {unit}/s")

        yield advance
