"""``pimerge tune``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from pimerge.adapters.kind import KINDS
from pimerge.adapters.selected import base_of, from_pool, select
from pimerge.cli import options
from pimerge.cli.console import note, print_family, print_json, print_table, tracker, warn
from pimerge.cli.inputs import parse_rank
from pimerge.core.errors import PimergeError
from pimerge.core.libraries import quiet_libraries
from pimerge.tuning.method import METHODS, open_tune_method

INSTEAD, INSTEAD_WITH_NAMES = "scratch", "named"
"""The methods where the ranking expects no expert to help: of one that takes no class names, and of one that does."""


@options.with_options_of(METHODS)
def tune(
    experts: options.Experts = None,
    method: Annotated[
        str, typer.Option(help=f"How to combine and train; --methods says more: {', '.join(METHODS.names())}.")
    ] = "guided",
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods, each with its formula and source.")
    ] = False,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    shots: options.Shots = None,
    epochs: Annotated[float, typer.Option(help="Most passes over the training examples.")] = 30,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of factors and head. Default, at hidden size 384: 0.005; 0.002 for interpolated and "
            "its kin; 1.3e-4 for full; wider bases have less."
        ),
    ] = None,
    weights_lr: Annotated[float, typer.Option(help="Learning rate of the experts' weights.")] = 5e-2,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    seed: options.Seed = 0,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the training examples kept for early stopping. Default: 0 for guided, else 0.2."),
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a better held-out loss before it stops.")] = 8,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes.")] = 0.1,
    choose: Annotated[
        str,
        typer.Option(
            "--select",
            help="fixed: learning rate and epochs as given; cv: chosen on folds of the examples, ten trainings.",
        ),
    ] = "fixed",
    weight_decay: Annotated[float, typer.Option(help="Of factors and head.")] = 0.01,
    decay_towards: Annotated[
        str, typer.Option(help="What weights decay towards: zero, or the start of the training.")
    ] = "zero",
    ema: Annotated[
        float | None, typer.Option(help="Keep a moving average of what trains, with this decay, such as 0.99.")
    ] = None,
    sam: Annotated[
        float | None, typer.Option(help="Sharpness-aware minimisation with this radius, such as 0.05: twice the time.")
    ] = None,
    class_names: options.ClassNames = None,
    start: Annotated[str, typer.Option(help="Weights start from the softmax of the ranking's scores, or equal.")] = (
        "ranking"
    ),
    granularity: Annotated[str, typer.Option(help="One weight vector per matrix, per layer, or global.")] = "matrix",
    rank: options.Rank = "max",
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of a fresh expert ({', '.join(KINDS.names())}). Default: the pool's, else lora."),
    ] = None,
    fresh_rank: Annotated[
        int | None,
        typer.Option(help="Rank of a fresh LoRA, or size of a bottleneck, prefix or prompt. Default: the pool's."),
    ] = None,
    fresh_alpha: Annotated[float | None, typer.Option(help="Alpha of a fresh LoRA. Default: as the rank's.")] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Modules of a fresh expert, with commas. Default: the pool's, or PEFT's choice."),
    ] = None,
    settings: dict[str, Any] = {},  # noqa: B006  one option for each that the methods have
    init_seed: Annotated[int, typer.Option(help="Init of a fresh expert; experts of one pool share it.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the tuned expert.")] = Path("tuned"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts and train on the target's examples, into one expert.

    Where the ranking expects no expert to help, a fresh one is trained ('--method scratch', or 'named').
    A run that was interrupted goes on where it was when the same command is given again.
    """
    if methods:
        print_family(METHODS, json)
        return
    from pimerge.tuning.options import TrainingOptions
    from pimerge.tuning.tune import STARTS
    from pimerge.tuning.tune import tune as tune_experts

    plan = open_tune_method(method, settings).plan
    if start not in STARTS:
        raise PimergeError(f"--start is '{start}'", f"expected {' or '.join(STARTS)}")
    chosen = select(experts, ranking, target, base, needed=plan.experts)
    if experts and not plan.experts:
        raise PimergeError(f"'{method}' composes no experts, and {len(experts)} were given", "leave them out")
    if chosen.task_folder is None:
        raise PimergeError("the target is not known", "pass --target FOLDER (an expert's or a task's)")
    quiet_libraries()
    from pimerge.tasks.task import open_task
    from pimerge.tuning.class_name_examples import may_take_names

    task, used = open_task(chosen.task_folder), method
    if plan.experts and not chosen.experts:
        warn(f"no expert is expected to help ({ranking}): training a fresh expert instead")
        used, settings = INSTEAD_WITH_NAMES if may_take_names(task, plan) else INSTEAD, {}
        holdout = plan.holdout if holdout is None else holdout  # the examples are as few as they were
        plan = open_tune_method(used).plan
    like = from_pool(chosen, ranking, base)
    values = {
        **locals(),
        "rank": parse_rank(rank),
        "fresh_kind": kind,
        "fresh_modules": tuple(name.strip() for name in modules.split(",")) if modules else None,
    }
    result = tune_experts(
        used,
        task,
        base_of(chosen.experts, chosen.target or like, base),
        chosen.experts,
        chosen.target,
        output,
        TrainingOptions(
            **{field.name: values[field.name] for field in fields(TrainingOptions) if field.name in values}
        ),
        settings=settings,
        select=choose,
        scores=chosen.scores if start == "ranking" else None,
        gains=chosen.gains if start == "ranking" else None,
        like=like,
        instead_of=method if used != method else None,
        device=device,
        dtype=dtype,
        force=force,
        track=tracker(quiet),
        note=lambda message: note(message, quiet),
    )
    if not result.outcome.writes:
        return  # another process does, and says so
    if json:
        print_json(
            {
                "output": str(output),
                "method": used,
                "experts": result.experts,
                "scales": result.scales,
                "rank": result.rank,
                "truncation": result.truncation,
                "epochs": result.outcome.epochs,
                "train_loss": result.outcome.train_loss,
                "held_out_loss": result.outcome.held_out_loss,
                "examples": result.examples,
                "trained_parameters": result.outcome.trained_parameters,
                "deployed_parameters": result.deployed_parameters,
                "weights": result.weights,
            }
        )
        return
    rows = [
        ["method", used],
        ["trained on", f"{result.examples} examples, {result.outcome.epochs:.0f} epochs"],
        ["parameters", f"{result.outcome.trained_parameters} trained, {result.deployed_parameters} deployed"],
        ["train loss", _loss(result.outcome.train_loss)],
        ["held-out loss", _loss(result.outcome.held_out_loss)],
    ]
    if result.rank:
        rows.append(["rank", f"{result.rank} (error {result.truncation:.2%})"])
    if result.weights and plan.experts:
        columns = list(zip(*result.weights.values(), strict=True))
        rows += [
            [
                f"weight of {name}",
                f"{sum(column) / len(column):.3f} ({min(column):.3f} to {max(column):.3f})"
                + (f" at scale {scale:g}" if scale != 1 else ""),
            ]
            for name, column, scale in zip(result.experts, columns, result.scales, strict=True)
        ]
    print_table(["", ""], rows)
    note(f"→ {output}; next: pimerge eval {output}", quiet)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
