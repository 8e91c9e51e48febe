"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pimerge.core import plugins


def listing(package: str) -> str:
    """``name: summary`` of each strategy, for ``--help``."""
    return " ".join(f"[bold]{name}[/]: {summary}" for name, summary in plugins.summaries(package).items())


def names(package: str) -> str:
    """The names of a folder's plugins."""
    return ", ".join(plugins.summaries(package))


def flag(option: str) -> str:
    """How an option of a strategy is typed.

    >>> flag("inner_method")
    '--inner'
    """
    return "--" + option.removesuffix("_method").replace("_", "-")


Experts = Annotated[
    list[str] | None,
    typer.Argument(help="Experts: folders or Hub ids (org/name@revision). Default: those that the ranking selected."),
]
StorePath = Annotated[Path, typer.Option("--store", help="The store of embeddings.")]
RankingPath = Annotated[Path, typer.Option("--ranking", help="The ranking that names the target and the experts.")]
TargetReference = Annotated[
    str | None,
    typer.Option("--target", help="The target: an expert's folder, or a task's. Default: the ranking's target."),
]
BaseReference = Annotated[
    str | None, typer.Option("--base", help="Base model (folder or Hub id[@revision]), in place of the experts' own.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float64.")]
Seed = Annotated[int, typer.Option(help="Decides every draw.")]
Shots = Annotated[int | None, typer.Option(help="Draw so many training examples of each class. Default: all.")]
ClassNames = Annotated[
    bool | None,
    typer.Option(
        help="The names of the classes are examples, too, where texts are classified. Default: for guided and named, "
        "if they foretell the others."
    ),
]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens of a batch. Default: by device.", min=1)]
Rank = Annotated[str, typer.Option(help="Rank of the result: a number, or max (nothing is lost).")]
