"""Scores of experts on a task's test split, with intervals and the bare base as a control."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import task_of
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Advance, Track, silent
from pimerge.models.heads import set_head
from pimerge.models.injection import injected
from pimerge.models.loaded_base import LoadedBase, in_head, most_virtual_tokens
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.tasks.examples import Examples, Scored, bucket_by_length
from pimerge.tasks.intervals import Interval, bootstrap_interval
from pimerge.tasks.label_order import label_order_remark
from pimerge.tasks.metric import METRICS, Answers
from pimerge.tasks.row_errors import some
from pimerge.tasks.task import Task
from pimerge.tuning.ensemble import Ensemble, ensemble_in_base

if TYPE_CHECKING:
    from torch import Tensor

Z95 = 1.959963984540054
BASE = "(base)"
BATCH_TOKENS = 16_384
Value = TypeVar("Value")


@dataclass(frozen=True)
class Score:
    """Scores of one expert, or of the bare base.

    Attributes:
        name: name of the expert, or ``(base)``.
        accuracy, accuracy_low, accuracy_high: fraction of correct answers and its 95 % interval (Wilson). Without
            classes, an answer is correct if it equals one of the references. For classes of words, the interval is from
            a bootstrap over sentences.
        loss, loss_low, loss_high: mean of −log p(y|x) in nats and its 95 % interval (normal, so not of one row).
        examples: number of examples in the test split.
        note: whose head answers, if it is not the expert's own.
        metrics: the task's metrics with 95 % intervals, of accuracy as above, of the others by a bootstrap.
    """

    name: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    loss_low: float | None
    loss_high: float | None
    examples: int
    note: str = ""
    metrics: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class TestSplit:
    """The labelled examples of one split, encoded once for several models.

    Attributes:
        labels: the class of each example, or the classes of its words.
        batches: indices of the examples of each batch; each example is in one batch.
    """

    task: Task
    examples: Examples
    labels: Sequence[int | Sequence[int]]
    batches: Sequence[Sequence[int]]

    def answers(self, model: nn.Module, advance: Advance) -> Scored:
        """Return the answers of a model to all examples, in their order."""
        order: list[int] = []
        parts: list[Scored] = []
        for indices in self.batches:
            parts.append(self.task.type.score(model, self.examples, indices))
            order += indices
            advance(len(indices))
        places = sorted(range(len(order)), key=lambda place: order[place])
        return Scored(
            torch.cat([part.losses.double().cpu() for part in parts])[places],
            _ordered([right for part in parts for right in part.right], places),
            _ordered([choice for part in parts for choice in part.chosen], places),
            _ordered([text for part in parts for text in part.texts], places),
            _ordered([cut for part in parts for cut in part.cut], places),
        )


def read_test_split(
    task: Task,
    loaded: LoadedBase,
    experts: Sequence[Expert],
    *,
    limit: int | None = None,
    seed: int = 0,
    padded: bool = True,
    note: Callable[[str], None] = lambda message: None,
) -> TestSplit:
    """Encode the test split for a base with some experts.

    Args:
        limit: maximum number of examples, sampled by the seed; None uses all.
        padded: False puts only examples of equal length into a batch.
        note: receives a remark if examples were cut.
    """
    examples, labels = task.examples("test", loaded.processor, loaded.config_for(experts), seed=seed, limit=limit)
    for remark in examples.remarks():
        note(f"test split: {remark}")
    padded = padded and not most_virtual_tokens(experts)
    return TestSplit(
        task, examples, examples.classes or labels, bucket_by_length(examples.lengths, BATCH_TOKENS, padded=padded)
    )


def score_experts(
    experts: Sequence[Expert | Ensemble],
    task: Task,
    base: Base,
    target: Expert | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> list[Score]:
    """Score the bare base and each expert or ensemble on the target's test split.

    The base answers with its own head if that is for the task's labels, otherwise with the head of the target's expert.
    Without either it has no score. An expert without a head answers with the base's own.

    Args:
        task: the target's task.
        base: the base of all experts.
        target: the target's own expert, if there is one.
        note: receives remarks, one sentence at a time.
    """
    problems = Problems()
    single = [each for row in experts for each in (row.experts if isinstance(row, Ensemble) else [row])]
    for expert in single:
        with problems.collected(f"'{expert.name}': "):
            _require_answers(expert, task, base)
    headless = Problems()
    for name in [expert.name for expert in single if task.type.trains_head and not expert.head]:
        hint = f"merge it with --head target, tune it, or pass a --base with a head for {', '.join(task.labels)}"
        headless.add(f"'{name}' has no head", hint)
    if problems.found:
        problems.extend(headless.found)
    problems.raise_any("these experts cannot be scored on this task")
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    scores = []
    loaded = load_base(base, task, resolved, precision)
    if not loaded.has_own_head:
        if headless.found and (order := loaded.other_order(task.labels)):
            headless.add(order, "correct 'labels' in task.json")
        headless.raise_any("these experts cannot be scored on this task")
    split = read_test_split(task, loaded, single, note=note)
    head, whose = _base_head(loaded, target, task)
    total = len(split.examples) * (len(experts) + (whose is not None))
    with track("evaluating", total, "examples") as advance:

        def run(name: str, model: nn.Module, whose: str) -> None:
            scores.append(score_model(name, model, split, whose, advance=advance, note=note))

        if whose is not None:
            set_head(loaded.model, head)
            run(BASE, loaded.model, whose)
        for row in experts:
            with ensemble_in_base(row, loaded) if isinstance(row, Ensemble) else injected(row, loaded) as model:
                run(row.name, model, _note(row, task))
    return scores


def score_model(
    name: str,
    model: nn.Module,
    split: TestSplit,
    whose: str = "",
    *,
    advance: Advance = lambda count: None,
    note: Callable[[str], None] = lambda message: None,
) -> Score:
    """Score a model on the test split.

    Args:
        whose: whose head answers, for the note of the score.
    """
    found = split.answers(model.eval(), advance)
    if endless := [row for row, cut in enumerate(found.cut) if cut]:
        note(
            f"{name}: {len(endless)} answers were cut at max_new_tokens, in rows {some(endless)} (from 0); "
            "increase it in task.json if they should be longer"
        )
    own_head = split.task.type.trains_head and name != BASE
    if own_head and (order := label_order_remark(found.chosen, split.labels, split.task.labels, "the test split")):
        note(f"{name}: {order}")
    return _score(name, found, split, whose)


def score_checkpoint(
    path: Path,
    task: Task,
    *,
    device: str = "auto",
    dtype: str = "auto",
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> Score:
    """Score a full checkpoint on the target's test split."""
    base = Base(str(path), None, path)
    rows = score_experts([], task, base, None, device=device, dtype=dtype, track=track, note=note)
    if not rows:
        raise PimergeError(
            f"the checkpoint '{path}' has no head for {', '.join(task.labels)}", "tune it on the target: --method full"
        )
    return replace(rows[0], name=path.name, note="a full checkpoint")


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson, 1927), which lies in [0, 1] and is not empty at 0 or 1.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _require_answers(expert: Expert, task: Task, base: Base) -> None:
    if expert.base.identity != base.identity:
        raise PimergeError(f"its base is '{expert.base.name}', the target's '{base.name}'", "score it separately")
    if not task.type.trains_head:  # the base answers in text
        return
    own = task_of(expert)
    if expert.head and own is not None and own.labels != task.labels:
        raise PimergeError(
            f"its head answers {', '.join(own.labels)}, the task asks for {', '.join(task.labels)}",
            "tune it on the target first: pimerge tune --method uniform EXPERT",
        )


def _note(row: Expert | Ensemble, task: Task) -> str:
    if isinstance(row, Ensemble):
        return f"{len(row.experts)} experts together"
    return "the base's own head" if task.type.trains_head and not row.head else ""


def _base_head(loaded: LoadedBase, target: Expert | None, task: Task) -> tuple[Mapping[str, Tensor], str | None]:
    """Return the head for the bare base and a note on it; the note is None if there is no such head."""
    if loaded.has_own_head:
        return {}, "its own head" if loaded.head else ""
    if target is None or not target.head:
        return {}, None
    own = task_of(target)
    if own is not None and own.labels != task.labels:
        return {}, None
    head = {name: value for name, value in target.head_tensors().items() if in_head(name, loaded.head)}
    return head, f"the head of {target.name}"


def _ordered(values: Sequence[Value], places: Sequence[int]) -> list[Value]:
    return [values[place] for place in places] if values else []


def _score(name: str, found: Scored, split: TestSplit, note: str) -> Score:
    task, examples = split.task, split.examples
    total = len(found.losses)
    right = sum(found.right)
    mean = float(found.losses.mean())
    if not math.isfinite(mean):
        raise PimergeError(f"the loss of '{name}' is not finite", "its weights diverged: tune it with a lower --lr")
    answers = Answers(found.chosen, split.labels, len(task.labels), found.texts, examples.references)
    # errors of words in one sentence are correlated, so Wilson's interval does not apply
    accuracy = (
        bootstrap_interval("accuracy", answers)
        if task.of_words
        else Interval(right / total, *wilson_interval(right, total))
    )
    metrics = {
        metric: accuracy if METRICS.load(metric).counts_right else bootstrap_interval(metric, answers)
        for metric in task.metrics
    }
    loss_low = loss_high = None
    if total > 1:
        half = Z95 * float(found.losses.std()) / math.sqrt(total)
        loss_low, loss_high = mean - half, mean + half
    return Score(name, accuracy.value, accuracy.low, accuracy.high, mean, loss_low, loss_high, total, note, metrics)
