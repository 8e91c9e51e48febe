"""Compose experts inside the model, train on the target's examples, export the result.

Checkpoints lie beside the output until the output is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pimerge.adapters.compatibility import refuse_over_inputs
from pimerge.adapters.expert import Expert
from pimerge.adapters.kind import KINDS
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.files import require_absent, sha256_bytes
from pimerge.core.manifest import Manifest, inputs_of, library_versions
from pimerge.core.progress import Track, silent
from pimerge.tasks.task import Task
from pimerge.tuning.components import chosen_experts
from pimerge.tuning.cross_validation import choose
from pimerge.tuning.fit import fit
from pimerge.tuning.method import TuneMethod, open_tune_method
from pimerge.tuning.options import TrainingOptions, check_options
from pimerge.tuning.session import TuneRequest, TuneResult, TuningSession, open_session

STARTS = ("ranking", "equal")
SELECTIONS = ("fixed", "cv")


def tune(
    method: str,
    task: Task,
    base: Base,
    experts: Sequence[Expert],
    target: Expert | None,
    output: Path,
    options: TrainingOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    select: str = "fixed",
    scores: Sequence[float | None] | None = None,
    gains: Sequence[float | None] | None = None,
    like: Expert | None = None,
    instead_of: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> TuneResult:
    """Compose, train and export.

    Args:
        method: a tune method.
        task: the target's task.
        experts: the chosen ones.
        target: the target's own expert, if it has one.
        settings: options of the method's own.
        select: ``cv``: learning rate and epochs are chosen on folds of the training examples; ``fixed``: as given.
        scores: of the experts in the ranking; the weights start from their softmax, with 1/N for the target's
            own. None, or None for one of them, is an equal start.
        gains: that the ranking expects of the experts, in accuracy over the bare base; 0.01 is a point.
        like: whose rank, alpha and modules a fresh expert has; by default the target's own, else the first of
            ``experts``.
        instead_of: the method that was asked for, where this one takes its place; for the manifest.
        note: told what the user should know, a sentence at a time.

    Returns:
        what was written; it is not in a base's model any longer.

    Raises:
        PimergeError: if the experts, the task, an option or the disk has a problem.
    """
    opened = open_tune_method(method, settings)
    plan = opened.plan
    require_absent(output, force)
    refuse_over_inputs(output, [*experts, *([target] if target else [])])
    check_options(options)
    if select not in SELECTIONS:
        raise PimergeError(f"--select is '{select}'", f"expected {' or '.join(SELECTIONS)}")
    _check_kind(opened, options)
    options = replace(options, holdout=plan.holdout if options.holdout is None else options.holdout)
    chosen = chosen_experts(opened, experts, target)
    like = target or like or next(iter(chosen), None)
    like_sha256 = like.sha256 if like else None
    run = _run_folder(opened, task, base, chosen, output, options, scores, gains, device, dtype, like_sha256, select)
    session = open_session(task, base, device, dtype, options.seed)
    options = replace(options, lr=plan.usual_lr(session.loaded.width) if options.lr is None else options.lr)
    request = TuneRequest(session, experts, target, like, scores, options, run, gains, track, note)
    if select == "cv":
        request = replace(request, options=choose(opened, request))
    with session.restored(options.seed) as undo:
        request = replace(request, undo=undo)
        result = fit(opened, request)
        if result.outcome.writes:
            result.write(output, manifest_of(opened, request, result, chosen, instead_of), force)
            shutil.rmtree(run, ignore_errors=True)
    return result


def manifest_of(
    method: TuneMethod,
    request: TuneRequest,
    result: TuneResult,
    chosen: Sequence[Expert],
    instead_of: str | None = None,
) -> Manifest:
    """The record of a tuning."""
    session: TuningSession = request.session
    return Manifest(
        command="tune",
        options={
            "method": method.name,
            **({"instead_of": instead_of} if instead_of else {}),
            "target": session.task.name,
            **asdict(request.options),
            **method.defaults,
            **result.settings,
            "dtype": str(session.precision),
        },
        device=session.device.type,
        versions=library_versions(),
        inputs=inputs_of(chosen),
        outputs={},
        results={
            "truncation": result.truncation,
            "train_examples": result.examples,
            "held_out_examples": result.held_out,
            "epochs": result.outcome.epochs,
            "train_loss": result.outcome.train_loss,
            "held_out_loss": result.outcome.held_out_loss,
            "trained_parameters": result.outcome.trained_parameters,
        },
    )


def _check_kind(method: TuneMethod, options: TrainingOptions) -> None:
    """Check that a fresh expert of a kind can be trained.

    Raises:
        PimergeError: if there is no such kind, or the method or another option does not go with it.
    """
    if options.fresh_kind is None:
        return
    kind = KINDS.load(options.fresh_kind)
    if method.plan.experts or not method.plan.train_experts:
        raise PimergeError(
            f"--kind is for a fresh expert alone, and '{method.name}' trains none",
            "leave it out, or take --method scratch",
        )
    if kind.stores_factors:
        return
    for option, value in (("--fresh-alpha", options.fresh_alpha), ("--rank", options.rank)):
        if value is not None:
            raise PimergeError(f"{option} is for LoRA, and --kind is '{options.fresh_kind}'", "leave it out")


def _run_folder(method: TuneMethod, task: Task, base: Base, chosen: Sequence[Expert], output: Path, *rest: Any) -> Path:
    """Where checkpoints lie: beside the output, a folder for each choice of inputs and options."""
    options = [asdict(part) if isinstance(part, TrainingOptions) else part for part in rest]
    inputs = [(expert.sha256, expert.strength) for expert in chosen]
    choice = [method.name, method.defaults, task.sha256(), base.identity, inputs, options]
    digest = sha256_bytes(json.dumps(choice, sort_keys=True, default=str).encode())[:12]
    return output.resolve().with_name(f".{output.name}.training-{digest}")
