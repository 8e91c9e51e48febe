"""``pimerge embed``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker


def embed(
    pools: options.Pools = None,
    store: options.StorePath = Path("embeddings.json"),
    examples: Annotated[int, typer.Option(min=1, help="Maximum training examples per expert.")] = 1000,
    labels: Annotated[str, typer.Option(help="Labels: true (from the data) or sampled (from the model).")] = "true",
    shots: options.Shots = None,
    up_to_shots: options.UpToShots = False,
    seed: options.Seed = 0,
    grams: Annotated[
        bool, typer.Option("--grams", help="Also store input Grams, which 'merge --method regmean' needs.")
    ] = False,
    batch_tokens: options.BatchTokens = None,
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Skip and list broken experts.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Recompute embeddings that are already in the store.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute the Fisher embedding of every expert in a pool.

    The embeddings are added to the store. After an interruption, the next call resumes where this one stopped.
    Experts that have not changed are not computed again.
    """
    from pimerge.embedding.embed import embed as embed_pool

    result = embed_pool(
        pools or "experts",
        store=store,
        examples=examples,
        labels=labels,
        shots=shots,
        up_to_shots=up_to_shots,
        seed=seed,
        grams=grams,
        batch_tokens=batch_tokens,
        base=base,
        device=device,
        dtype=dtype,
        skip_broken=skip_broken,
        force=force,
        track=tracker(quiet),
        note=partial(note, quiet=quiet),
        warn=partial(note, quiet=False),
    )
    if json:
        print_json(result.to_dict())
        return
    print_table(
        ["expert", "task", "examples", "tokens", "‖F‖", "route", ""],
        [
            [
                name,
                str(entry.task["type"]),
                str(entry.examples),
                str(entry.tokens),
                f"{entry.norm:.3g}",
                entry.route,
                "" if name in result.computed else "unchanged",
            ]
            for name, entry in sorted(result.experts.items())
        ],
        right=["examples", "tokens", "‖F‖"],
    )
    note(f"→ {store} ({result.stored} experts); next: pimerge rank --target NAME", quiet)
