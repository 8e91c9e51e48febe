"""``pimerge rank``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, tracker, warn
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from pimerge.adapters.ranking_document import Ranking

AUTO = "auto"


def rank(
    target: Annotated[
        str | None,
        typer.Option("--target", help="The target: an expert's name in the store, its folder, or a task's folder."),
    ] = None,
    k: Annotated[
        str, typer.Option("-k", help="How many experts to select, or auto: by the gain of their means, or the gaps.")
    ] = "2",
    measure: Annotated[
        str, typer.Option(help="combined if the target's examples can be read, else fisher; see --measures.")
    ] = AUTO,
    shots: options.Shots = None,
    examples: Annotated[int, typer.Option(min=2, help="Most examples of the target to look at.")] = 500,
    seed: options.Seed = 0,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Select only experts that are expected to help.")
    ] = True,
    train_target: Annotated[
        bool, typer.Option("--train-target", help="Train an expert of a target that has none, and rank by the store.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show why this expert has its place; writes nothing.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure who helps whom within the store, for --measure history.")
    ] = False,
    measures: Annotated[bool, typer.Option("--measures", help="List the measures and what they need.")] = False,
    store: options.StorePath = Path("embeddings.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the ranking goes.")] = Path("ranking.json"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rank the experts of the store by how much they are expected to help the target, and select the first k.

    Where the target's examples can be read, every expert is tried on them at four strengths; else the store alone
    decides. If no expert is expected to help, none is selected, and 'pimerge tune' trains a fresh one.

    Plain state dicts, .safetensors files in one folder, need no store: pass the target's file. They are ranked by
    'parameters'.
    """
    from pimerge.cli.rank.show import print_explanation, print_gains, print_measures

    if measures:
        print_measures(json)
        return
    from pimerge.ranking.rank import ranked
    from pimerge.ranking.state_dicts import ranked_state_dicts
    from pimerge.ranking.target import RankRequest

    request = RankRequest(
        store,
        measure,
        _count(k),
        gate,
        shots,
        examples,
        seed,
        train_target,
        base,
        device,
        dtype,
        force,
        note=partial(note, quiet=quiet),
        warn=warn,
    )
    if calibrate:
        from pimerge.ranking.rank_by_examples import calibrate_store

        gains = calibrate_store(request, tracker(quiet))
        if target is None:
            print_gains(gains, str(store), json)
            note(f"→ {store}; next: pimerge rank --measure history --target NAME", quiet)
            return
    if target is None:
        raise PimergeError("the target is not given", "pass --target NAME, an expert's folder or a task's folder")
    states = ranked_state_dicts(target, request, output.resolve().parent)
    if states is not None:
        if explain is not None or calibrate:
            raise PimergeError("--explain and --calibrate do not apply to plain state dicts", "leave them out")
        _write(states, output, request.k, force, json, quiet, "merge --method uniform")
        return
    with ranked(target, request, output.resolve().parent, tracker(quiet)) as found:
        if explain is not None:
            print_explanation(found, explain, json)
            return
    _write(found.ranking, output, request.k, force, json, quiet, "tune")


def _write(ranking: Ranking, output: Path, k: int | None, force: bool, json: bool, quiet: bool, after: str) -> None:
    from pimerge.adapters.ranking_document import write_ranking
    from pimerge.cli.rank.show import print_ranking

    write_ranking(ranking, output, force)
    if json:
        print_json(ranking.model_dump())
        return
    print_ranking(ranking, k, quiet)
    note(f"→ {output}; next: pimerge {after}", quiet)


def _count(k: str) -> int | None:
    """``auto`` is None."""
    if k == AUTO:
        return None
    if not k.isdecimal() or int(k) < 1:
        raise PimergeError(f"-k is '{k}'", "expected a number from 1, or auto")
    return int(k)
