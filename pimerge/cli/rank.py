"""``pimerge rank``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker, warn
from pimerge.core.errors import PimergeError
from pimerge.ranking.measure import MEASURES

if TYPE_CHECKING:
    from pimerge.adapters.ranking_document import Candidate, Ranking
    from pimerge.ranking.rank import Explanation

AUTO = "auto"
SHOWN = 12
GAIN = "expected gain, points"


def rank(
    target: Annotated[
        str | None,
        typer.Option("--target", help="Target: name of an expert in the store, or folder of an expert or a task."),
    ] = None,
    k: Annotated[
        str,
        typer.Option("-k", help="Maximum number of experts to select. auto: by expected gain, or by gaps in scores."),
    ] = "2",
    measure: Annotated[
        str,
        typer.Option(help="Measure to rank by. auto: combined if examples of the target can be read, else fisher."),
    ] = AUTO,
    shots: options.Shots = None,
    up_to_shots: options.UpToShots = False,
    examples: Annotated[int, typer.Option(min=2, help="Maximum examples of the target.")] = 500,
    seed: options.Seed = 0,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Select only experts that are expected to help.")
    ] = True,
    train_target: Annotated[
        bool, typer.Option("--train-target", help="Train an expert for a target that has none, and embed it.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Explain the score of this expert, and write nothing.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the gains between experts of the store, for --measure history.")
    ] = False,
    measures: Annotated[bool, typer.Option("--measures", help="List the measures and what they need.")] = False,
    store: options.StorePath = Path("embeddings.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("ranking.json"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rank experts by how much they are expected to help the target, and select the best.

    If examples of the target can be read, every expert is tried on them at four strengths. Otherwise, the experts are
    ranked by their stored embeddings. If no expert is expected to help, none is selected, and 'pimerge tune' trains a
    fresh one.

    Plain state dicts (.safetensors files in one folder) need no store: pass the target's file as --target.
    """
    if measures:
        print_measures(json)
        return
    from pimerge.ranking.rank import explain as explain_place
    from pimerge.ranking.rank import rank as rank_pool
    from pimerge.ranking.state_dicts import are_state_dicts
    from pimerge.ranking.target import RankRequest

    request = RankRequest(
        store=store,
        k=options.count(k, "-k", AUTO),
        measure=measure,
        shots=shots,
        up_to_shots=up_to_shots,
        examples=examples,
        seed=seed,
        gate=gate,
        train_target=train_target,
        base=base,
        device=device,
        dtype=dtype,
        force=force,
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
        raise PimergeError("the target is not given", "pass --target with a name or a folder")
    if explain is not None:
        print_explanation(explain_place(target, explain, request), json)
        return
    ranking = rank_pool(target, **vars(request)).save(output, force=force)
    if json:
        print_json(ranking.to_dict())
        return
    print_ranking(ranking, request.k, quiet)
    note(f"→ {output}; next: pimerge {'merge --method uniform' if plain else 'tune'}", quiet)


def print_ranking(ranking: Ranking, k: int | None, quiet: bool) -> None:
    """Print the candidates, best first, then the experts that are not comparable, the bare base, and notes.

    Args:
        k: number of experts asked for; None for auto.
    """
    gains = any(candidate.gain is not None for candidate in ranking.candidates)
    scored = not gains or any(candidate.score != candidate.gain for candidate in ranking.candidates)
    rows = []
    for place, candidate in enumerate(ranking.candidates, 1):
        mark = "selected" if candidate.name in ranking.selected else "" if candidate.helps else "not expected to help"
        score = f"{candidate.score:.4f} ± {(candidate.high - candidate.low) / 2:.4f}"
        rows.append(
            [
                str(place),
                candidate.name,
                *([score] if scored else []),
                *([f"{candidate.scale:g}", _points(candidate)] if gains else []),
                mark,
            ]
        )
    columns = ["", "expert", *([ranking.measure] if scored else []), *(["scale", GAIN] if gains else []), ""]
    blank = ["–"] * (len(columns) - 3)
    rows += [["–", other.name, *blank, f"not comparable: {other.reason}"] for other in ranking.not_comparable]
    if scored and ranking.base_score is not None:
        rows.append(["–", "(base)", f"{ranking.base_score:.4f}", *blank[1:], ""])
    print_table(columns, rows, right=columns[2:-1])
    for sentence in [*ranking.notes, ranking.why]:
        note(sentence, quiet)
    if ranking.candidates and not ranking.selected:
        note("'pimerge tune' will train a fresh expert (--no-gate selects anyway)", quiet)
    elif k is not None and len(ranking.candidates) < k:
        note(f"only {len(ranking.candidates)} of the {k} experts asked for are comparable", quiet)
    elif k is not None and len(ranking.selected) < k:
        helpful = sum(each.helps for each in ranking.candidates)
        if helpful < k:
            note(f"only {helpful} of the {k} experts asked for are expected to help", quiet)


def _points(candidate: Candidate) -> str:
    """Format the expected gain and its interval, in points of accuracy."""
    values = (candidate.gain or 0.0, candidate.gain_low or 0.0, candidate.gain_high or 0.0)
    gain, low, high = (f"{100 * value:+.1f}" for value in values)
    return f"{gain} [{low}, {high}]"


def print_measures(json: bool) -> None:
    """Print every measure with its requirements and summary."""
    rows = [[measure.name, measure.requirements, measure.summary] for measure in MEASURES]
    if json:
        print_json([dict(zip(("measure", "needs", "summary"), row, strict=True)) for row in rows])
    else:
        print_table(["measure", "needs", ""], rows)


def print_gains(gains: Mapping[str, Mapping[str, Mapping[float, float]]], store: str, json: bool) -> None:
    """Print the results of ``rank --calibrate``: the gain of each source for each target, at its best scale.

    Args:
        gains: target → source → scale → gain.
    """
    if json:
        print_json({"store": store, "gains": gains})
        return
    sources = sorted({source for row in gains.values() for source in row})
    rows = [
        [name, *(f"{100 * max(row[source].values()):+.1f}" if source in row else "" for source in sources)]
        for name, row in gains.items()
    ]
    print_table(["target \\ source, points at its best scale", *sources], rows, right=sources)


def print_explanation(found: Explanation, json: bool) -> None:
    """Print the parts of a candidate's score: by tensor for stored embeddings, by strength for examples."""
    if json:
        print_json(found.to_dict())
        return
    if found.strengths:
        parts = list(next(iter(found.strengths.values())))
        rows = [
            [f"{scale:g}", *(f"{values[part]:+.4f}" for part in parts)] for scale, values in found.strengths.items()
        ]
        print_table(["scale", *parts], rows, right=["scale", *parts])
    if found.tensors:
        total = sum(found.tensors.values())
        ordered = sorted(found.tensors.items(), key=lambda item: -abs(item[1]))
        rows = [[tensor, f"{value:+.4f}"] for tensor, value in ordered[:SHOWN]]
        if len(ordered) > SHOWN:
            rows.append([f"{len(ordered) - SHOWN} others", f"{sum(v for _, v in ordered[SHOWN:]):+.4f}"])
        rows.append(["sum", f"{total:+.4f}"])
        print_table(["tensor", f"adds to '{found.measure}'"], rows, right=[f"adds to '{found.measure}'"])
