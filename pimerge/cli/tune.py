"""``pimerge tune``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.adapters.kind import KINDS
from pimerge.cli import options
from pimerge.cli.console import done_before, note, print_family, print_json, print_table, tracker, warn
from pimerge.tuning.method import METHODS, Granularity, MixturePlan

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneResult

HOLDOUT = ", ".join(
    [f"{MixturePlan.holdout:g}"]
    + [f"{each.plan.holdout:g} ({each.name})" for each in METHODS if each.plan.holdout != MixturePlan.holdout]
)


@options.with_options_of(METHODS)
def tune(
    experts: options.Experts = None,
    method: Annotated[
        str, typer.Option(help=f"Tune method; --methods describes them: {', '.join(METHODS.names())}.")
    ] = "guided",
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods with their formulas and sources.")
    ] = False,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    shots: options.Shots = None,
    up_to_shots: options.UpToShots = False,
    epochs: Annotated[float, typer.Option(help="Maximum passes over the training examples.")] = 30,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of factors and head. Default: by method and hidden size, at most 0.005."),
    ] = None,
    weights_lr: Annotated[float, typer.Option(help="Learning rate of the experts' weights.")] = 5e-2,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    seed: options.Seed = 0,
    holdout: Annotated[
        float | None, typer.Option(help=f"Share of the examples held out for early stopping. Default: {HOLDOUT}.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a lower held-out loss before training stops.")] = 8,
    label_smoothing: Annotated[float, typer.Option(help="Label smoothing of the loss.")] = 0.1,
    select: Annotated[
        str,
        typer.Option(help="Learning rate and epochs: fixed (as given) or cv (by cross-validation, ten trainings)."),
    ] = "fixed",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of factors and head.")] = 0.01,
    decay_towards: Annotated[
        str, typer.Option(help="Target of the weight decay: zero, or start (the values before training).")
    ] = "zero",
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the trained parameters, such as 0.99.")
    ] = None,
    sam: Annotated[
        float | None, typer.Option(help="Radius of sharpness-aware minimisation, such as 0.05; doubles the time.")
    ] = None,
    class_names: options.ClassNames = None,
    start: Annotated[
        str, typer.Option(help="Initial weights of the experts: ranking (softmax of its scores) or equal.")
    ] = "ranking",
    granularity: Annotated[
        str, typer.Option(help=f"Modules that share one weight per expert: {', '.join(Granularity)}.")
    ] = "matrix",
    allow_disjoint: options.AllowDisjoint = False,
    rank: Annotated[str, typer.Option(help="Rank of the result: a number, or max (lossless).")] = "max",
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of a fresh expert ({', '.join(KINDS.names())}). Default: as in the pool, or lora."),
    ] = None,
    fresh_rank: Annotated[
        int | None,
        typer.Option(help="Rank of a fresh LoRA, or size of a bottleneck, prefix or prompt. Default: as in the pool."),
    ] = None,
    fresh_alpha: Annotated[
        float | None, typer.Option(help="Alpha of a fresh LoRA. Default: in proportion to the rank, as in the pool.")
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Modules of a fresh expert, separated by commas. Default: as in the pool, or in PEFT."),
    ] = None,
    settings: options.Settings = None,
    init_seed: Annotated[
        int, typer.Option(help="Random seed for the init of a fresh expert; the experts of one pool share it.")
    ] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("tuned"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts into one by training on the target's examples.

    If the ranking selected no expert, a fresh one is trained. Give the same command again to resume an interrupted
    run.
    """
    if methods:
        print_family(METHODS, json)
        return
    from pimerge.tuning.options import TrainingOptions
    from pimerge.tuning.tune import tune as run

    with done_before(json, quiet):
        result = run(
            experts,
            method=method,
            target=target,
            ranking=ranking,
            base=base,
            options=TrainingOptions(
                epochs=epochs,
                lr=lr,
                weights_lr=weights_lr,
                batch_size=batch_size,
                seed=seed,
                holdout=holdout,
                patience=patience,
                shots=shots,
                label_smoothing=label_smoothing,
                weight_decay=weight_decay,
                decay_towards=decay_towards,
                ema=ema,
                sam=sam,
                granularity=granularity,
                class_names=class_names,
                rank=options.count(rank, "--rank", "max"),
                fresh_kind=kind,
                fresh_rank=fresh_rank,
                fresh_alpha=fresh_alpha,
                fresh_modules=tuple(name.strip() for name in modules.split(",")) if modules else None,
                init_seed=init_seed,
            ),
            select=select,
            up_to_shots=up_to_shots,
            start=start,
            allow_disjoint=allow_disjoint,
            device=device,
            dtype=dtype,
            output=output,
            force=force,
            track=tracker(quiet),
            note=partial(note, quiet=quiet),
            warn=warn,
            **(settings or {}),
        )
    if not result.outcome.writes:
        return  # another process writes and prints the result
    if json:
        print_json(result.to_dict())
        return
    print_table(["", ""], _rows(result))
    note(f"→ {output}; next: pimerge eval {output}", quiet)


def _rows(result: TuneResult) -> list[list[str]]:
    rows = [
        ["method", result.method],
        ["trained on", f"{result.examples} examples, {result.outcome.epochs:.0f} epochs"],
        ["parameters", f"{result.outcome.trained_parameters} trained, {result.deployed_parameters} deployed"],
        ["train loss", _loss(result.outcome.train_loss)],
        ["held-out loss", _loss(result.outcome.held_out_loss)],
    ]
    if result.rank:
        rows.append(["rank", f"{result.rank} (error {result.truncation:.2%})"])
    if result.weights and METHODS.load(result.method).plan.experts:
        columns = list(zip(*result.weights.values(), strict=True))
        rows += [
            [
                f"weight of {name}",
                f"{sum(column) / len(column):.3f} ({min(column):.3f} to {max(column):.3f})"
                + (f" at scale {scale:g}" if scale != 1 else ""),
            ]
            for name, column, scale in zip(result.experts, columns, result.scales, strict=True)
        ]
    return rows


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
