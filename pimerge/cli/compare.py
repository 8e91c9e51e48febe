"""``pimerge compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_line, print_table, tracker
from pimerge.core.errors import PimergeError, Problems


def compare(
    experts: Annotated[
        list[str] | None,
        typer.Argument(help="Pool: experts, or folders of experts. Default: the candidates of the ranking."),
    ] = None,
    target: options.TargetReference = None,
    shots: Annotated[str, typer.Option(help="Training examples per class, such as 1,5,20,all.")] = "5",
    up_to_shots: options.UpToShots = False,
    seeds: Annotated[int, typer.Option(help="Number of random samplings of the examples, with seeds 0, 1, ….")] = 3,
    methods: Annotated[
        str, typer.Option(help="Tune methods, separated by commas. 'pimerge tune --methods' lists them.")
    ] = "guided,learned,interpolated",
    controls: Annotated[
        str | None,
        typer.Option(
            help="Controls, separated by commas: head, scratch, named, full, single, uniform, random; or none. "
            "Default: all except random; named only if a method trains on class names."
        ),
    ] = None,
    counts: Annotated[
        str, typer.Option("--experts", help="Numbers of ranked experts to combine, such as 1,2,4.")
    ] = "2",
    also_test: Annotated[
        list[str] | None, typer.Option(help="Another task on whose test split to score; repeatable.")
    ] = None,
    draw_from: Annotated[
        str | None, typer.Option(help="Data split to sample examples from. Default: the training split.")
    ] = None,
    rank_by: Annotated[
        str,
        typer.Option(help="Order of experts: draws (ranked on the examples of each sampling) or ranking (as saved)."),
    ] = "draws",
    select: Annotated[
        str, typer.Option(help="Learning rates: fixed (as given) or cv (by cross-validation for each method).")
    ] = "fixed",
    epochs: Annotated[float, typer.Option(help="Passes over the training examples, for all methods.")] = 30,
    lr: Annotated[
        list[str] | None,
        typer.Option(help="Learning rate of a method, as METHOD=NUMBER; repeatable. Default: as in 'pimerge tune'."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    class_names: options.ClassNames = None,
    holdout: Annotated[float, typer.Option(help="Share of the examples held out for early stopping.")] = 0.0,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file to write; a .md and a .csv file are written beside it.")
    ] = Path("comparison.json"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare tune methods and controls on small samples of the target's examples.

    All methods train on the same examples with the same budget. Every run is stored beside the output: the same
    command resumes an interrupted comparison, and more methods, shots or seeds add only the new runs. Under
    'accelerate launch' the processes share the runs.
    """
    from pimerge.evaluation.compare import compare as run
    from pimerge.evaluation.comparison import COLUMNS
    from pimerge.evaluation.design import check_names

    problems = Problems()
    numbers, ks, rates = [], [], {}
    asked = None if controls is None else [] if controls == "none" else _listed(controls)
    with problems.collected():
        numbers = [options.count(text, "--shots", "all") for text in _listed(shots)]
    with problems.collected():
        ks = [number for text in _listed(counts) if (number := options.count(text, "--experts"))]
    with problems.collected():
        rates = dict(_rate(text) for text in lr or [])
    with problems.collected():
        check_names(_listed(methods), asked or [])
    problems.raise_any("some options are not valid")
    found = run(
        target,
        experts=experts,
        shots=numbers,
        up_to_shots=up_to_shots,
        seeds=seeds,
        methods=_listed(methods),
        controls=asked,
        counts=ks,
        also_test=also_test or [],
        draw_from=draw_from,
        rank_by=rank_by,
        select=select,
        epochs=epochs,
        lr=rates,
        batch_size=batch_size,
        class_names=class_names,
        holdout=holdout,
        ranking=ranking,
        base=base,
        device=device,
        dtype=dtype,
        output=output,
        force=force,
        track=tracker(quiet),
        note=partial(note, quiet=quiet),
    )
    if found is None:
        return
    if json:
        print_json(found.to_dict())
        return
    for title, rows in found.tables():
        print_line(title)
        print_table(COLUMNS, rows, right=("experts", "trained", "deployed", "seconds"))
        print_line("")
    print_line(found.conclusion)
    note(f"→ {output}, {output.with_suffix('.md').name}, {output.with_suffix('.csv').name}", quiet)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise PimergeError(f"--lr is '{text}'", "expected METHOD=NUMBER, such as scratch=0.005") from None
