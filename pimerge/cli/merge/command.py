"""``pimerge merge``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import done_before, note, print_family, tracker
from pimerge.merging.method import METHODS
from pimerge.merging.request import DTYPE, HEAD, SPACE

_JOINING = " and ".join(method.name for method in METHODS if method.joins_target)
_BY_SCORE = " and ".join(method.name for method in METHODS if method.weights_by_score)


@options.with_options_of(METHODS)
def merge(
    experts: options.Experts = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"Merge method; --methods describes them: {', '.join(METHODS.names())}. Default: "
            "uniform, or interpolated with weights."
        ),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods with their formulas and sources.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Weights, one per expert, such as 0.6,0.4. They need not sum to 1.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Weight by module, such as 'a=0.5' or 'experts/a:*.layers.1?.*=0.7'; repeatable."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help=f"Weight of the target's own expert, which {_JOINING} add to the selected experts. The others share "
            f"the rest: in {_BY_SCORE} by the softmax of their scores, otherwise evenly. Default: 1/N for N experts."
        ),
    ] = None,
    coefficients: Annotated[
        Path | None,
        typer.Option(help="File with weights: coefficients.json, or JSON of expert → weight or {glob: weight}."),
    ] = None,
    settings: options.Settings = None,
    space: Annotated[str, options.of(SPACE)] = "core",
    seed: options.Seed = 0,
    rank: Annotated[
        str, typer.Option(help="Rank of the result: a number, max (lossless) or auto (the least that keeps --energy).")
    ] = "max",
    energy: Annotated[
        float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every module. Default with --rank auto: 0.99.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Merge only modules that match this glob, such as '*.q_proj'; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out modules that match; repeatable.")] = None,
    head: Annotated[str, options.of(HEAD)] = "target",
    dtype: Annotated[str | None, options.of(DTYPE)] = None,
    expert_order: options.ExpertOrdering = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Full checkpoint (folder or .safetensors file) to merge the result into; it is not changed."),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Merge into the dequantised weights of an --into that bitsandbytes quantised, and write those.",
        ),
    ] = False,
    allow_disjoint: options.AllowDisjoint = False,
    fisher: Annotated[
        list[Path] | None,
        typer.Option(help="File with the diagonal Fisher of a full checkpoint; repeat it for each, in order."),
    ] = None,
    store: options.StorePath = Path("embeddings.json"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="First check that every expert, merged alone, comes back unchanged.")
    ] = False,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    config: options.Config = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder to write, or a .safetensors file if the experts are single files."),
    ] = Path("merged"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts into one without training.

    The merge is exact in ΔW, and the base model is not loaded. Full checkpoints (folders with a config.json and
    weights) can be merged as well, relative to their --base.
    """
    if methods:
        print_family(METHODS, json)
        return
    from pimerge.merging.merge import merge as merge_experts

    with done_before(json, quiet):
        merged = merge_experts(
            experts,
            method=method,
            weights=None if weights is None else options.numbers(weights, "--weights"),
            rules=weight or [],
            alpha=alpha,
            coefficients=coefficients,
            space=space,
            seed=seed,
            rank=rank,
            energy=energy,
            include=include or [],
            exclude=exclude or [],
            head=head,
            dtype=dtype,
            expert_order=expert_order,
            into=into,
            dequantize=dequantize,
            allow_disjoint=allow_disjoint,
            fisher=fisher or [],
            store=store,
            target=target,
            ranking=ranking,
            base=base,
            config=config,
            verify=verify,
            output=output,
            force=force,
            dry_run=dry_run,
            track=tracker(quiet),
            note=partial(note, quiet=quiet),
            **(settings or {}),
        )
    from pimerge.cli.merge.show import show

    show(merged, as_json=json, say=partial(note, quiet=quiet))
