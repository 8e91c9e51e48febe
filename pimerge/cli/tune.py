"""``pimerge tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pimerge.adapters.kind import KINDS
from pimerge.cli import options
from pimerge.cli.console import note, print_family, print_json, print_table, tracker, warn
from pimerge.cli.inputs import parse_rank
from pimerge.core.libraries import quiet_libraries
from pimerge.tuning.method import METHODS, Granularity

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneResult


@options.with_options_of(METHODS)
def tune(
    experts: options.Experts = None,
    method: Annotated[
        str, typer.Option(help=f"How to combine and train; --methods explains each: {', '.join(METHODS.names())}.")
    ] = "guided",
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods, each with its formula and source.")
    ] = False,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    shots: options.Shots = None,
    epochs: Annotated[float, typer.Option(help="Maximum number of passes over the training examples.")] = 30,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of factors and head. Default, at hidden size 384: 0.005; 0.002 for interpolated and "
            "methods like it; 1.3e-4 for full; lower for wider bases."
        ),
    ] = None,
    weights_lr: Annotated[float, typer.Option(help="Learning rate of the experts' weights.")] = 5e-2,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    seed: options.Seed = 0,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the training examples kept for early stopping. Default: 0 for guided, else 0.2."),
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a lower held-out loss before training ends.")] = 8,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target probability spread over all classes.")
    ] = 0.1,
    select: Annotated[
        str,
        typer.Option(
            help="fixed: learning rate and epochs as given; cv: chosen on folds of the examples, ten trainings."
        ),
    ] = "fixed",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of factors and head.")] = 0.01,
    decay_towards: Annotated[
        str, typer.Option(help="What weights decay towards: zero, or the start of the training.")
    ] = "zero",
    ema: Annotated[
        float | None,
        typer.Option(help="Keep a moving average of trained parameters with this decay, such as 0.99."),
    ] = None,
    sam: Annotated[
        float | None, typer.Option(help="Sharpness-aware minimisation with this radius, such as 0.05: twice the time.")
    ] = None,
    class_names: options.ClassNames = None,
    start: Annotated[
        str, typer.Option(help="Where the experts' weights start: ranking (the softmax of its scores), or equal.")
    ] = "ranking",
    granularity: Annotated[
        str, typer.Option(help=f"Which modules share a weight vector: {', '.join(Granularity)}.")
    ] = "matrix",
    rank: options.Rank = "max",
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of a fresh expert ({', '.join(KINDS.names())}). Default: the pool's, else lora."),
    ] = None,
    fresh_rank: Annotated[
        int | None,
        typer.Option(help="Rank of a fresh LoRA, or size of a bottleneck, prefix or prompt. Default: the pool's."),
    ] = None,
    fresh_alpha: Annotated[
        float | None, typer.Option(help="Alpha of a fresh LoRA. Default: in proportion to the rank, as in the pool.")
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Modules of a fresh expert, separated by commas. Default: the pool's, or PEFT's choice."),
    ] = None,
    settings: dict[str, Any] = {},  # noqa: B006  one option for each that the methods have
    init_seed: Annotated[
        int, typer.Option(help="Decides the init of a fresh expert; the experts of one pool share it.")
    ] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the tuned expert.")] = Path("tuned"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts and train on the target's examples, into one expert.

    Where the ranking expects no expert to help, a fresh one is trained ('--method scratch', or 'named').
    A run that was interrupted continues where it stopped when the same command is given again.
    """
    if methods:
        print_family(METHODS, json)
        return
    quiet_libraries()
    from pimerge.tuning.options import TrainingOptions
    from pimerge.tuning.tune import tune as run

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
            rank=parse_rank(rank),
            fresh_kind=kind,
            fresh_rank=fresh_rank,
            fresh_alpha=fresh_alpha,
            fresh_modules=tuple(name.strip() for name in modules.split(",")) if modules else None,
            init_seed=init_seed,
        ),
        select=select,
        start=start,
        device=device,
        dtype=dtype,
        output=output,
        force=force,
        track=tracker(quiet),
        note=lambda message: note(message, quiet),
        warn=warn,
        **settings,
    )
    if not result.outcome.writes:
        return  # another process does, and says so
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
