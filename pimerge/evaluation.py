"""Scores of experts on a task's test split, with intervals and the bare base as a control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pimerge.base import Base
from pimerge.errors import PimergeError, Problems
from pimerge.expert import Expert
from pimerge.export import task_of
from pimerge.model import (
    LoadedBase,
    load_base,
    most_virtual_tokens,
    plugged_in,
    resolve_device,
    resolve_dtype,
    set_head,
)
from pimerge.progress import Advance, Track, silent
from pimerge.task import Task
from pimerge.task_types import Examples, bucket_by_length

if TYPE_CHECKING:
    from torch import Tensor

Z95 = 1.959963984540054
BASE = "(base)"


@dataclass(frozen=True)
class Score:
    """One row of the result.

    Attributes:
        name: the expert's, or ``(base)``.
        accuracy, accuracy_low, accuracy_high: share of right answers and its 95 % interval (Wilson).
        loss, loss_low, loss_high: mean of −log p(y|x) in nats and its 95 % interval (normal).
        examples: of the test split.
        note: whose head answers, where it is not the expert's own.
    """

    name: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    loss_low: float
    loss_high: float
    examples: int
    note: str = ""


def evaluate(
    experts: Sequence[Expert],
    task: Task,
    base: Base,
    target: Expert | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = 16_384,
    track: Track = silent,
) -> list[Score]:
    """Score the bare base and each expert on the target's test split.

    The base answers with its own head if its labels are the task's, else with the target expert's head; if
    neither is there, it has no row.

    Args:
        task: the target's.
        base: that of every expert.
        target: the target's own expert, if it is known.

    Raises:
        PimergeError: if an expert has no head for the task's labels, another base, or does not fit it.
    """
    problems = Problems()
    for expert in experts:
        with problems.collected(f"'{expert.name}': "):
            _require_answers(expert, task, base)
    problems.raise_any("these experts cannot be scored on this task")
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    scores = []
    loaded = load_base(base, task, resolved, precision)
    examples, _ = task.examples("test", loaded.processor, loaded.config_for(experts))
    padded = not most_virtual_tokens(experts)
    head, note = _base_head(loaded, target, task)
    total = len(examples) * (len(experts) + (note is not None))
    with track("evaluating", total, "examples") as advance:

        def run(name: str, model: nn.Module, note: str) -> None:
            batches = bucket_by_length(examples.lengths, batch_tokens, padded=padded)
            scores.append(_score(name, model, examples, batches, task, resolved, note, advance))

        if note is not None:
            set_head(loaded.model, head)
            run(BASE, loaded.model, note)
        for expert in experts:
            with plugged_in(expert, loaded) as model:
                run(expert.name, model, "")
    return scores


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); it stays in [0, 1] and is not empty at 0 or 1.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _require_answers(expert: Expert, task: Task, base: Base) -> None:
    if expert.base.identity != base.identity:
        raise PimergeError(f"its base is '{expert.base.name}', the target's '{base.name}'", "score it apart")
    own = task_of(expert)
    if not expert.head:
        raise PimergeError("it has no head", "merge it with --head target, or tune it")
    if own is not None and own.labels != task.labels:
        raise PimergeError(
            f"its head answers {', '.join(own.labels)}, the task asks for {', '.join(task.labels)}",
            "tune it on the target first: pimerge tune --method uniform EXPERT",
        )


def _base_head(loaded: LoadedBase, target: Expert | None, task: Task) -> tuple[Mapping[str, Tensor], str | None]:
    """The head for the bare base, and a note on it; no note means that there is no head to be had."""
    if loaded.has_own_head:
        return {}, "its own head"
    if target is None or not target.head:
        return {}, None
    own = task_of(target)
    if own is not None and own.labels != task.labels:
        return {}, None
    return target.head_tensors(), f"the head of {target.name}"


def _score(
    name: str,
    model: nn.Module,
    examples: Examples,
    batches: Sequence[Sequence[int]],
    task: Task,
    device: torch.device,
    note: str,
    advance: Advance,
) -> Score:
    losses, right = [], 0
    for indices in batches:
        batch = {key: value.to(device) for key, value in examples.batch(indices).items()}
        loss, correct = task.type.score(model, batch)
        losses.append(loss.double().cpu())
        right += int(correct.sum())
        advance(len(indices))
    all_losses = torch.cat(losses)
    total = len(all_losses)
    low, high = wilson_interval(right, total)
    mean = float(all_losses.mean())
    half = Z95 * float(all_losses.std()) / math.sqrt(total) if total > 1 else math.inf
    if not math.isfinite(mean):
        raise PimergeError(f"the loss of '{name}' is not finite", "its weights diverged: tune it with a lower --lr")
    return Score(name, right / total, low, high, mean, mean - half, mean + half, total, note)
