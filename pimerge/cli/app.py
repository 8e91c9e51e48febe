"""The command ``pimerge``."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pimerge.cli import compare, convert, embed, env, extract, inspect, plot, rank, report, tune, verify
from pimerge.cli import eval as evaluate
from pimerge.cli.merge import command as merge
from pimerge.cli.streams import prepare_streams
from pimerge.core.errors import PimergeError
from pimerge.core.files import disk_hint
from pimerge.core.version import __version__

EXIT_PROBLEM = 3
EXIT_INTERRUPTED = 130
SELDOM = (100_000, 20, 20)
"""Thresholds of the garbage collector. With the defaults it would scan the objects of a large store again and again."""


class Commands(TyperGroup):
    """The group of commands, with a --help option that does not import pydantic."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help of ``pimerge`` itself."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # for None, Typer 0.29 imports pydantic, which doubles the time of --help
        return option


app = typer.Typer(
    name="pimerge",
    cls=Commands,
    help="Rank, merge and tune PEFT adapters (experts) for a new task with few labels.",
    epilog="pimerge embed ./experts · pimerge rank --target X -k 2 · pimerge tune --method learned",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "embed": embed.embed,
    "rank": rank.rank,
    "merge": merge.merge,
    "tune": tune.tune,
    "compare": compare.compare,
    "eval": evaluate.evaluate,
    "plot": plot.plot,
    "report": report.report,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "convert": convert.convert,
    "extract": extract.extract,
    "env": env.env,
}
for name, command in COMMANDS.items():
    # Typer would print the line breaks within a paragraph
    app.command(name, help=re.sub(r"(?<!\n)\n(?!\n)", " ", getdoc(command) or ""))(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pimerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Define the options of ``pimerge`` itself."""


def main() -> None:
    """Run the command line and turn a PimergeError into a message and an exit status."""
    gc.set_threshold(*SELDOM)
    warnings.simplefilter("ignore")  # those of libraries are not for the user of a command
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it misses a kernel on CPUs
    prepare_streams()
    try:
        try:
            app()
        finally:  # Typer ends with SystemExit
            sys.stdout.flush()
    except PimergeError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except MemoryError as error:
        _fail(PimergeError("the memory is full", f"close some programs, or use smaller inputs ({error})"))
    except OSError as error:  # where no step knows better what it was reading or writing
        if not error.errno:
            raise
        file = f"'{os.fsdecode(error.filename)}'" if isinstance(error.filename, str | bytes) else "a file"
        _fail(PimergeError(f"cannot read or write {file}: {os.strerror(error.errno)}", disk_hint(error.errno)))


def _fail(error: PimergeError) -> None:
    from pimerge.cli.console import show_error

    show_error(error)
    sys.exit(EXIT_PROBLEM)
