"""The command ``pimerge``."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pimerge.cli import compare, embed, inspect, report, tune
from pimerge.cli import eval as evaluate
from pimerge.cli.merge import command as merge
from pimerge.cli.plot import command as plot
from pimerge.cli.rank import command as rank
from pimerge.core.errors import PimergeError
from pimerge.core.version import __version__

EXIT_PROBLEM = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
SELDOM = (100_000, 20, 20)
"""When the collector looks for cycles: by default it would search the objects of a large store many times over."""


class Commands(TyperGroup):
    """Knows that its own --help was not given without pydantic, whose import doubles the time of a command's help."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help of ``pimerge`` itself."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # Typer 0.29 has None, and imports pydantic to tell that this is not True
        return option


app = typer.Typer(
    name="pimerge",
    cls=Commands,
    help="Rank, merge and tune experts (PEFT adapters) from a pool for a new task with few labels.",
    epilog="pimerge embed ./experts · pimerge rank --target X -k 2 · pimerge tune --method learned",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("embed")(embed.embed)
app.command("rank")(rank.rank)
app.command("merge")(merge.merge)
app.command("tune")(tune.tune)
app.command("compare")(compare.compare)
app.command("eval")(evaluate.evaluate)
app.command("plot")(plot.plot)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pimerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of ``pimerge`` itself."""


def main() -> None:
    """Run the command line; the one place where a PimergeError becomes a message and a status."""
    gc.set_threshold(*SELDOM)
    try:
        app()
        sys.stdout.flush()
    except PimergeError as error:
        from pimerge.cli.console import stderr

        console = stderr()
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        sys.exit(EXIT_PROBLEM)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of standard output went away, as in `pimerge … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
