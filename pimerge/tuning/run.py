"""Run a tuning whose experts and task are open: check the options, train, and write the result."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from pimerge.adapters.compatibility import refuse_only_merged, refuse_over_inputs
from pimerge.adapters.expert import Expert
from pimerge.adapters.kind import KINDS
from pimerge.checkpoints.base import Base
from pimerge.core.errors import AlreadyDone, PimergeError
from pimerge.core.files import output_lock
from pimerge.core.manifest import (
    Manifest,
    inputs_of,
    library_versions,
    raise_if_done,
    refuse_foreign,
    request_hash,
    require_absent_or_own,
)
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.tasks.task import Task
from pimerge.tuning.adapted_head import without_adapted
from pimerge.tuning.components import chosen_experts
from pimerge.tuning.cross_validation import choose
from pimerge.tuning.fit import fit
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.options import TrainingOptions, check_options
from pimerge.tuning.session import TuneRequest, TuneResult, open_session


class RateSelection(StrEnum):
    """How learning rate and epochs are chosen."""

    FIXED = "fixed"
    CV = "cv"
    """By cross-validation on the training examples."""


def check_rate_selection(select: str) -> None:
    """Refuse a word that is no :class:`RateSelection`."""
    if select not in list(RateSelection):
        raise PimergeError(f"--select must be {' or '.join(RateSelection)}; got '{select}'")


@dataclass(frozen=True, kw_only=True)
class TuneInputs:
    """The inputs of a tuning.

    Attributes:
        task: the target's task.
        experts: the chosen experts, each at its strength, best first.
        target: the target's own expert, if there is one.
        like: the expert whose rank, alpha and modules a fresh expert takes; by default the target's own or the first.
        scores: the ranking's score of each expert. The weights start from their softmax, with 1/N for the target's own
            expert; if a score is unknown, they start equal.
        gains: the ranking's expected gain of each expert over the bare base, in accuracy; 0.01 is a point.
        select: a :class:`RateSelection`.
        instead_of: the requested method, if this one replaces it; for the manifest.
    """

    method: TuneMethod
    task: Task
    base: Base
    experts: Sequence[Expert] = ()
    target: Expert | None = None
    like: Expert | None = None
    scores: Sequence[float | None] | None = None
    gains: Sequence[float | None] | None = None
    options: TrainingOptions = field(default_factory=TrainingOptions)
    select: str = RateSelection.FIXED
    instead_of: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def form(self) -> Expert | None:
        """The expert whose rank, alpha and modules a fresh expert takes."""
        return self.target or self.like or next(iter(self.experts), None)


def run_tuning(
    inputs: TuneInputs, output: Path, *, force: bool = False, track: Track = silent, note: Note = unheard
) -> TuneResult:
    """Train a mixture and write the result to a folder.

    Checkpoints are kept beside the output until it is complete, so an interrupted run continues from them.

    Args:
        force: replace an existing output.
    """
    with output_lock(output, note):
        return _run(inputs, output, force, track, note)


def _run(inputs: TuneInputs, output: Path, force: bool, track: Track, note: Note) -> TuneResult:
    method, plan, options = inputs.method, inputs.method.plan, inputs.options
    require_absent_or_own(output, force)
    refuse_over_inputs(output, [*inputs.experts, *([inputs.target] if inputs.target else [])])
    refuse_only_merged([*inputs.experts, *([inputs.form] if inputs.form else [])], "tuned")
    check_options(options)
    check_rate_selection(inputs.select)
    _check_kind(method, options)
    options = replace(options, holdout=plan.holdout if options.holdout is None else options.holdout)
    chosen = chosen_experts(method, inputs.experts, inputs.target)
    decided = _request_hash(replace(inputs, options=options), chosen)
    run = output.resolve().with_name(f".{output.name}.training-{decided[:12]}")
    if not force:
        _raise_if_done(output, decided, run)
    refuse_foreign(output)
    session = open_session(inputs.task, inputs.base, inputs.device, inputs.dtype, options.seed)
    session = replace(session, loaded=without_adapted(session.loaded, chosen))
    options = replace(options, lr=plan.usual_lr(session.loaded.width) if options.lr is None else options.lr)
    request = TuneRequest(
        session=session,
        experts=inputs.experts,
        target=inputs.target,
        like=inputs.form,
        scores=inputs.scores,
        options=options,
        run=run,
        gains=inputs.gains,
        track=track,
        note=note,
    )
    if inputs.select == RateSelection.CV:
        request = replace(request, options=choose(method, request))
    with session.restored(options.seed) as undo:
        request = replace(request, undo=undo)
        result = replace(fit(method, request), method=method.name, output=output)
        if result.outcome.writes:
            manifest = manifest_of(method, request, result, chosen, inputs.instead_of)
            result.write(output, manifest.model_copy(update={"request": decided}), force)
            shutil.rmtree(run, ignore_errors=True)
    return result


def manifest_of(
    method: TuneMethod,
    request: TuneRequest,
    result: TuneResult,
    chosen: Sequence[Expert],
    instead_of: str | None = None,
) -> Manifest:
    """Make the manifest of a tuning."""
    session = request.session
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
    """Refuse a kind of fresh expert that does not exist, or does not fit the method or another option."""
    if options.fresh_kind is None:
        return
    kind = KINDS.load(options.fresh_kind)
    if method.plan.experts or not method.plan.train_experts:
        raise PimergeError(
            f"--kind is only for a fresh expert, and '{method.name}' does not train one",
            "leave it out, or use --method scratch",
        )
    if kind.stores_factors:
        return
    for option, value in (("--fresh-alpha", options.fresh_alpha), ("--rank", options.rank)):
        if value is not None:
            raise PimergeError(f"{option} is for LoRA, and --kind is '{options.fresh_kind}'", "leave it out")


def _request_hash(inputs: TuneInputs, chosen: Sequence[Expert]) -> str:
    """The hash of inputs and options, which also names the folder of the checkpoints."""
    return request_hash(
        command="tune",
        method=[inputs.method.name, inputs.method.defaults, asdict(inputs.options), inputs.select],
        place=[inputs.task.sha256(), inputs.base.identity, inputs.device, inputs.dtype],
        experts=[(expert.sha256, expert.strength) for expert in chosen],
        start=[inputs.form and inputs.form.sha256, inputs.scores, inputs.gains],
    )


def _raise_if_done(output: Path, request: str, run: Path) -> None:
    try:
        raise_if_done(output, request)
    except AlreadyDone:
        shutil.rmtree(run, ignore_errors=True)  # a stop between the last two steps left it
        raise
