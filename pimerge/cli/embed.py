"""``pimerge embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pimerge.adapters.selected import pool_members
from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.libraries import quiet_libraries


def embed(
    pools: Annotated[
        list[str] | None, typer.Argument(help="Pools (folders of experts), experts, or Hub ids. Default: ./experts.")
    ] = None,
    store: options.StorePath = Path("embeddings.json"),
    examples: Annotated[int, typer.Option(min=1, help="Most examples of each expert's training split.")] = 1000,
    labels: Annotated[str, typer.Option(help="true: the data's labels; sampled: drawn from the model.")] = "true",
    shots: options.Shots = None,
    seed: options.Seed = 0,
    grams: Annotated[
        bool,
        typer.Option("--grams", help="Collect the inputs' Gram matrices, too, for 'merge --method regmean'."),
    ] = False,
    batch_tokens: options.BatchTokens = None,
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Embed the others and say which.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compute what the store has already, too.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Embed every expert of a pool by the Fisher information of its parameters, into the store.

    Can be interrupted: the next call goes on where this one was. An unchanged expert is not computed again.
    """
    from pimerge.adapters.compatibility import check_expert
    from pimerge.adapters.expert import open_expert
    from pimerge.embedding.embed import LABEL_MODES, embed_expert
    from pimerge.embedding.store import Store
    from pimerge.embedding.store_schema import EmbedSettings
    from pimerge.models.loading import Bases, resolve_device, resolve_dtype

    if labels not in LABEL_MODES:
        raise PimergeError(f"--labels is '{labels}'", f"expected {' or '.join(LABEL_MODES)}")
    target = Store(store)
    references = pool_members(pools or ["experts"])
    problems = Problems()
    ready = []
    names: dict[str, Path] = {}
    for reference in references:
        with problems.collected(f"{reference}: " if len(references) > 1 else ""):
            expert = open_expert(reference, base)
            task = check_expert(expert)
            if expert.name in names:
                raise PimergeError(
                    f"its name '{expert.name}' is that of '{names[expert.name]}' too", "rename one of the folders"
                )
            names[expert.name] = expert.path
            ready.append((expert, task))
    if not skip_broken or not ready:
        problems.raise_any("some experts cannot be embedded (--skip-broken embeds the others)")
    for problem in problems.found:
        note(f"skipped {problem.message}", quiet=False)
    for name in [name for name in target.experts if not target.folder_of(name).is_dir()]:
        target.drop(name)
        note(f"{name}: its folder is gone; dropped from the store", quiet)
    quiet_libraries()
    resolved = resolve_device(device)
    bases = Bases(resolved, resolve_dtype(dtype, resolved))
    # experts of one base and as many labels follow each other, so that it is loaded once
    ready.sort(key=lambda pair: (pair[0].base.identity, pair[1].file.type, len(pair[1].labels)))
    settings = EmbedSettings(labels=labels, max_examples=examples, shots=shots, seed=seed)
    computed = []
    try:
        for number, (expert, task) in enumerate(ready, 1):
            note(f"[{number}/{len(ready)}] {expert.name}", quiet)
            outcome = embed_expert(
                expert,
                task,
                target,
                settings,
                bases,
                batch_tokens=batch_tokens,
                grams=grams,
                force=force,
                track=tracker(quiet),
            )
            if outcome.computed:
                computed.append(expert.name)
            else:
                note(f"{expert.name}: unchanged since it was embedded", quiet)
            if outcome.fisher and outcome.fisher.why_loop:
                note(f"{expert.name}: one example at a time, since {outcome.fisher.why_loop}", quiet)
            if outcome.truncated:
                note(f"{expert.name}: {outcome.truncated} examples are longer than the model takes and were cut", quiet)
    except KeyboardInterrupt:
        note("interrupted: what is embedded is in the store, and the same command goes on from there", quiet)
        raise
    entries = {expert.name: target.experts[expert.name] for expert, _ in ready}
    if grams:
        note(f"Gram matrices: {sum(map(target.grams_size, entries)) / 1e6:.1f} MB", quiet)
    if json:
        print_json(
            {
                "store": str(store),
                "computed": computed,
                "skipped": [problem.message for problem in problems.found],
                "experts": {name: entry.model_dump(exclude={"settings"}) for name, entry in entries.items()},
            }
        )
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
                "" if name in computed else "unchanged",
            ]
            for name, entry in sorted(entries.items())
        ],
        right=["examples", "tokens", "‖F‖"],
    )
    note(f"→ {store} ({len(target.experts)} experts); next: pimerge rank --target NAME", quiet)
