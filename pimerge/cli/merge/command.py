"""``pimerge merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_family, tracker
from pimerge.cli.inputs import parse_numbers, parse_rank
from pimerge.merging.method import METHODS
from pimerge.merging.request import DTYPE, HEAD, SPACE


@options.with_options_of(METHODS)
def merge(
    experts: options.Experts = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"How to merge; --methods explains each: {', '.join(METHODS.names())}. Default: uniform."),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods, each with its formula and source.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the experts given, in their order: 0.6,0.4. They need not sum to 1.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="A weight by module, repeatable: 'EXPERT=0.5' or 'experts/a:*.layers.1?.*=0.7'."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Weight of the target's expert, for 'interpolated' and 'fisher'. The others divide the rest: in "
            "'interpolated' by the softmax of their scores, else evenly. Default: 1/(k+1)."
        ),
    ] = None,
    coefficients: Annotated[
        Path | None,
        typer.Option(
            help="Weights from a file: tuned/coefficients.json, or JSON of expert → weight or {glob: weight}."
        ),
    ] = None,
    settings: options.Settings = None,
    space: Annotated[str, options.of(SPACE)] = "core",
    seed: options.Seed = 0,
    rank: Annotated[
        str, typer.Option(help="Rank of the result: a number, max (nothing is lost) or auto (what --energy needs).")
    ] = "max",
    energy: Annotated[
        float | None, typer.Option(help="Share of ‖ΔW‖² to keep with the lowest rank, module by module. auto: 0.99.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Merge only modules that match a glob, such as '*.q_proj'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out modules that match a glob.")] = None,
    head: Annotated[str, options.of(HEAD)] = "target",
    dtype: Annotated[str | None, options.of(DTYPE)] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Merge the result into this full checkpoint (a folder or a .safetensors file) and write that."
        ),
    ] = None,
    fisher: Annotated[
        list[Path] | None,
        typer.Option(
            help="File with the diagonal Fisher of a full checkpoint; one for each, in order. LoRA: the store's."
        ),
    ] = None,
    store: options.StorePath = Path("embeddings.json"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="First merge every expert alone, and check that it comes back unchanged."),
    ] = False,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the merged expert.")] = Path("merged"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts into one without training, exactly in ΔW; the base model is not loaded.

    Default experts: those that the ranking selected; for 'interpolated' and 'fisher' also the target's own expert.
    Full checkpoints (folders with a config.json and weights) merge against their --base by the linear and
    elementwise methods and 'fisher'.
    """
    if methods:
        print_family(METHODS, json)
        return
    from pimerge.merging.merge import merge as merge_experts

    merged = merge_experts(
        experts,
        method=method,
        options=settings,
        weights=None if weights is None else parse_numbers(weights, "--weights"),
        rules=weight or [],
        alpha=alpha,
        coefficients=coefficients,
        space=space,
        seed=seed,
        rank=rank if rank == "auto" else parse_rank(rank) or "max",
        energy=energy,
        include=include or [],
        exclude=exclude or [],
        head=head,
        dtype=dtype,
        into=into,
        fisher=fisher or [],
        store=store,
        target=target,
        ranking=ranking,
        base=base,
        verify=verify,
        output=output,
        force=force,
        dry_run=dry_run,
        track=tracker(quiet),
        note=lambda message: note(message, quiet),
    )
    from pimerge.cli.merge.show import show

    show(merged, as_json=json, say=lambda message: note(message, quiet))
