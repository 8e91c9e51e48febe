"""``pimerge.tune``: combine experts by training on a target's examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pimerge.adapters import selected
from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking
from pimerge.adapters.shared_modules import require_shared_modules
from pimerge.checkpoints.base import Base
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.tasks.task import Task, TaskSource, open_task
from pimerge.tuning.class_name_examples import class_texts
from pimerge.tuning.method import METHODS, TuneMethod, open_tune_method
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import RateSelection, TuneInputs, run_tuning
from pimerge.tuning.session import TuneResult


class WeightStart(StrEnum):
    """How the experts' weights are initialised."""

    RANKING = "ranking"
    """The softmax of the ranking's scores or expected gains."""
    EQUAL = "equal"


@checked_arguments()
def tune(
    experts: str | Path | Expert | Sequence[str | Path | Expert] | Ranking | None = None,
    *,
    method: str = "guided",
    target: Expert | TaskSource | None = None,
    ranking: str | Path | Ranking = "ranking.json",
    base: str | Path | Base | None = None,
    options: TrainingOptions | None = None,
    select: str = RateSelection.FIXED,
    up_to_shots: bool = False,
    start: str = WeightStart.RANKING,
    allow_disjoint: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    output: str | Path = "tuned",
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
    warn: Note = unheard,
    **settings: Any,
) -> TuneResult:
    """Combine experts and train on the target's examples, into one expert.

    If the ranking predicts that no expert helps, a fresh expert is trained in their place. To continue an interrupted
    call from its last checkpoint, repeat it.

    Args:
        experts: folders, Hub ids (``org/name@revision``) or open experts; or a ranking. By default the experts that
            ``ranking`` selects.
        method: a tune method; ``pimerge tune --methods`` lists them.
        target: the folder or Hub id of the target's own expert, the folder of its task, an open expert or task, or
            rows in memory (a ``datasets.Dataset`` or a list of dicts). By default the ranking's target.
        ranking: a ranking or its file, with the target, the experts, and their scores and gains.
        base: the base model, a folder or Hub id; it replaces the base that the experts name.
        options: training options.
        select: ``fixed`` uses the given learning rate and epochs; ``cv`` chooses both by cross-validation.
        up_to_shots: take all examples of a class that has fewer than ``options.shots``, instead of refusing.
        start: initial weights of the experts: ``ranking`` uses its scores or gains, ``equal`` uses 1/N.
        allow_disjoint: accept experts that adapt different modules, and so share none.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: ``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float64``.
        output: the folder of the tuned expert.
        force: replace an existing output.
        track: shows progress.
        note: receives notes, one sentence at a time.
        warn: receives warnings, one sentence at a time.
        **settings: fields of :class:`~pimerge.tuning.options.TrainingOptions`, which override ``options``, and the
            method's own options, such as ``epochs=10`` and ``runs=5``.

    Returns:
        the result with its ``output``, the weight of each expert, losses and sizes.
        ``result.load(base_model)`` puts it into a base model with PEFT.

    Example:
        In a folder with experts and a ranking::

            result = pimerge.tune(method="soup", epochs=10, runs=5)
            result.outcome.held_out_loss
    """
    names = {field.name for field in fields(TrainingOptions)}
    options = replace(options or TrainingOptions(), **{name: settings[name] for name in settings if name in names})
    asked = open_tune_method(method, {name: value for name, value in settings.items() if name not in names})
    if start not in list(WeightStart):
        raise PimergeError(f"--start must be {' or '.join(WeightStart)}; got '{start}'")
    given = None if isinstance(experts, Ranking) else selected.listed(experts)
    if given and not asked.plan.experts:
        raise PimergeError(f"'{method}' combines no experts, and {len(given)} were given", "leave them out")
    ranking = experts if isinstance(experts, Ranking) else ranking
    ranked = ranking if isinstance(ranking, Ranking) else Path(ranking)
    source = target if target is None or isinstance(target, str | Path | Expert) else open_task(target)
    reference = base.reference if isinstance(base, Base) else None if base is None else str(base)
    chosen = selected.select(given, ranked, source, reference, needed=asked.plan.experts)
    if not allow_disjoint:
        require_shared_modules(chosen.experts)
    if chosen.task_source is None:
        raise PimergeError("there is no target", "pass --target with the folder of an expert or a task")
    task, used = replace(open_task(chosen.task_source), up_to_shots=up_to_shots), asked
    if asked.plan.experts and not chosen.experts:
        where = ranked.path if isinstance(ranked, Ranking) else ranked
        warn(f"no expert is expected to help ({where}): training a fresh expert instead")
        used = _without_experts(asked, task)
        if options.holdout is None:  # the number of examples is the same, so keep the method's own share
            options = replace(options, holdout=asked.plan.holdout)
    like = selected.from_pool(chosen, ranked, reference)
    inputs = TuneInputs(
        method=used,
        task=task,
        base=base if isinstance(base, Base) else selected.base_of(chosen.experts, chosen.target or like, reference),
        experts=chosen.experts,
        target=chosen.target,
        like=like,
        scores=chosen.scores if start == WeightStart.RANKING else None,
        gains=chosen.gains if start == WeightStart.RANKING else None,
        options=options,
        select=select,
        instead_of=method if used is not asked else None,
        device=device,
        dtype=dtype,
    )
    return run_tuning(inputs, Path(output), force=force, track=track, note=note)


def _without_experts(method: TuneMethod, task: Task) -> TuneMethod:
    """The method that replaces another when no expert is expected to help."""
    instead = METHODS.load(method.without_experts)
    return METHODS.load(instead.without_names) if instead.without_names and not class_texts(task) else instead
