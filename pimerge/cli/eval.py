"""``pimerge eval``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker

if TYPE_CHECKING:
    from pimerge.evaluation.evaluate import Evaluation


def evaluate(
    experts: Annotated[
        list[str] | None, typer.Argument(help="Experts to score. Default: ./tuned and ./merged, if they exist.")
    ] = None,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the scores to.")] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score experts and the bare base on the target's test split.

    Every score has a 95 % confidence interval. Ensembles and full checkpoints written by 'pimerge tune' can be scored
    like experts.
    """
    from pimerge.core.files import json_text, output_lock, write_file
    from pimerge.core.replacing import require_replaceable, require_same_or_absent
    from pimerge.evaluation.evaluate import evaluate as score

    if output is not None:
        require_replaceable(output, json_text({"target": "", "split": "", "scores": []}), force)  # before hours of work
    found = score(
        experts,
        target=target,
        ranking=ranking,
        base=base,
        device=device,
        dtype=dtype,
        track=tracker(quiet),
        note=partial(note, quiet=quiet),
    )
    if json:
        print_json(found.to_dict())
    else:
        _print(found)
    note(f"on the test split of {found.target}", quiet or json)
    if output is not None:
        content = json_text(found.to_dict())
        with output_lock(output):
            require_same_or_absent(output, content, force)  # a rerun after a stop finds its own scores
            write_file(output, content)


def _print(found: Evaluation) -> None:
    """Print the table of scores."""
    from pimerge.tasks.metric import METRICS

    formats = {name: METRICS.load(name).format for name in found.task.metrics}
    print_table(
        ["expert", *(title for name in formats for title in (name, "95 %")), "loss", "95 %", "n", ""],
        [
            [
                row.name,
                *(text for name, style in formats.items() for text in _cells(asdict(row.metrics[name]), style)),
                *_cells({"value": row.loss, "low": row.loss_low, "high": row.loss_high}, ".3f"),
                str(row.examples),
                row.note,
            ]
            for row in found
        ],
        right=[*formats, "loss", "n"],
    )


def _cells(found: dict[str, float | None], style: str) -> list[str]:
    """Format a value and its interval, if it has one."""
    value, low, high = ("" if found[key] is None else format(found[key], style) for key in ("value", "low", "high"))
    return [value, f"{low} – {high}" if low else "–"]
