"""``pimerge rank``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, tracker, warn
from pimerge.core.errors import PimergeError

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
    examples: Annotated[int, typer.Option(min=2, help="Maximum number of the target's examples to use.")] = 500,
    seed: options.Seed = 0,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Select only experts that are expected to help.")
    ] = True,
    train_target: Annotated[
        bool, typer.Option("--train-target", help="Train an expert of a target that has none, and rank by the store.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Explain the rank of this expert; writes nothing.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure how much the store's experts help each other's tasks, for --measure history.",
        ),
    ] = False,
    measures: Annotated[bool, typer.Option("--measures", help="List the measures and what they need.")] = False,
    store: options.StorePath = Path("embeddings.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of the ranking.")] = Path("ranking.json"),
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
    from pimerge.cli.rank.show import print_explanation, print_gains, print_measures, print_ranking

    if measures:
        print_measures(json)
        return
    from pimerge.ranking.rank import explain as explain_place
    from pimerge.ranking.rank import rank as rank_pool
    from pimerge.ranking.state_dicts import are_state_dicts
    from pimerge.ranking.target import RankRequest

    request = RankRequest(
        store,
        _count(k),
        measure,
        shots,
        examples,
        seed,
        gate,
        train_target,
        base,
        device,
        dtype,
        force,
        track=tracker(quiet),
        note=partial(note, quiet=quiet),
        warn=warn,
    )
    plain = target is not None and are_state_dicts(target, store)
    if plain and (explain is not None or calibrate):
        raise PimergeError("--explain and --calibrate do not apply to plain state dicts", "leave them out")
    if calibrate:
        from pimerge.ranking.calibration import calibrate_store

        gains = calibrate_store(request)
        if target is None:
            print_gains(gains, str(store), json)
            note(f"→ {store}; next: pimerge rank --measure history --target NAME", quiet)
            return
    if target is None:
        raise PimergeError("the target is not given", "pass --target NAME, an expert's folder or a task's folder")
    if explain is not None:
        print_explanation(explain_place(target, explain, request), json)
        return
    ranking = rank_pool(target, **vars(request)).save(output, force=force)
    if json:
        print_json(ranking.to_dict())
        return
    print_ranking(ranking, request.k, quiet)
    note(f"→ {output}; next: pimerge {'merge --method uniform' if plain else 'tune'}", quiet)


def _count(k: str) -> int | None:
    """``auto`` is None."""
    if k == AUTO:
        return None
    if not k.isdecimal() or int(k) < 1:
        raise PimergeError(f"-k is '{k}'", "expected a number from 1, or auto")
    return int(k)
