"""Scores of weighted sums of experts, with the target's own expert among them, on the target's test examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError, Problems
from pimerge.core.plugins import Option
from pimerge.reporting.figure import FigureData, FigureInputs

if TYPE_CHECKING:
    from torch import nn

    from pimerge.adapters.expert import Expert
    from pimerge.adapters.ranking_document import Candidate
    from pimerge.checkpoints.base import Base
    from pimerge.core.progress import Advance
    from pimerge.evaluation.scoring import TestSplit
    from pimerge.models.loaded_base import LoadedBase
    from pimerge.tasks.task import Task

BASE = "(base)"
INPUTS = ("experts", "target", "ranking", "base", "device", "dtype")
LIMIT = Option("limit", int, "Maximum number of test examples of the target.", lambda limit: limit >= 1, "at least 1")
SEED = Option("seed", int, "Seed of the sampling of test examples.")
SAMPLING = {LIMIT: 500, SEED: 0}
"""Options of figures that score test examples, with their defaults."""


@dataclass(frozen=True)
class Study:
    """A target with its own expert, and other experts.

    Attributes:
        target: the target's own expert.
        experts: the other experts at full strength, best first.
        left_out: name → why the expert cannot be combined with the target's expert.
    """

    target: Expert
    task: Task
    base: Base
    experts: Sequence[Expert]
    left_out: dict[str, str] = field(default_factory=dict)


def open_study(inputs: FigureInputs) -> Study:
    """Open the target with its expert, and the named experts, otherwise all experts of the ranking."""
    from pimerge.adapters.compatibility import require_alike
    from pimerge.adapters.selected import base_of
    from pimerge.tasks.task import open_task

    target, folder = _open_target(inputs)
    others = _open_others(inputs, target)
    left_out = {}
    for expert in others:
        try:
            require_alike([target, expert])
        except PimergeError as error:
            error.raise_if_disk_fails()
            left_out[expert.name] = error.problems[0].message
    kept = [expert for expert in others if expert.name not in left_out]
    if not kept or (inputs.experts and left_out):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "there are none"
        raise PimergeError(f"'{target.name}' cannot be summed with the other experts ({reasons})", "name others")
    return Study(target, open_task(folder), base_of([], target, inputs.base), kept, left_out)


def _open_target(inputs: FigureInputs) -> tuple[Expert, Path]:
    """Open the target's own expert, and return it with the folder of its task."""
    from pimerge.adapters.selected import select

    if inputs.target is None and not inputs.ranking.is_file():
        raise PimergeError(
            f"the target is not known: there is no ranking '{inputs.ranking}'",
            "run 'pimerge rank --target NAME' first, or pass --target FOLDER and name the experts",
        )
    chosen = select(None, inputs.ranking, inputs.target, inputs.base, needed=False)
    if chosen.target is None:
        raise PimergeError(
            f"the target '{chosen.task_folder}' has no expert of its own, which this plot needs",
            "train one: pimerge rank --train-target --measure fisher --force "
            f"--target {chosen.task_folder}, or pimerge tune --method scratch --target {chosen.task_folder}",
        )
    assert chosen.task_folder is not None
    return chosen.target, chosen.task_folder


def _open_others(inputs: FigureInputs, target: Expert) -> list[Expert]:
    """Open the other experts at full strength, regardless of the strengths in the ranking."""
    from pimerge.adapters.ranking_document import Reference, open_ranked, read_ranking
    from pimerge.adapters.selected import open_all

    names = inputs.experts
    candidates: dict[str, Candidate] = {}
    if not names or inputs.ranking.is_file():
        candidates = {candidate.name: candidate for candidate in read_ranking(inputs.ranking).candidates}
    found: list[Expert] = []
    problems = Problems()
    for name in names or candidates:
        with problems.collected():
            if name == target.name:
                continue
            if name in candidates and not (names and Path(name).is_dir()):
                known = candidates[name]
                plain = Reference(name=known.name, path=known.path, sha256=known.sha256)
                found.append(open_ranked(plain, inputs.ranking, inputs.base))
            else:
                found += open_all([name], inputs.base)
    problems.raise_any("some experts cannot be opened")
    return [expert for expert in found if expert.sha256 != target.sha256]


@dataclass(frozen=True, kw_only=True)
class ShownExamples(FigureData):
    """The test examples of a figure.

    Attributes:
        head: name of the target's expert, whose head answers, or ``(base)`` if the base answers in text.
        examples: number of examples of the test split, sampled by the seed.
    """

    target: str
    head: str
    examples: int
    seed: int

    def sentence(self) -> str:
        """Describe the examples for a title."""
        head = "" if self.head == BASE else f", the head of {self.head}"
        return f"{self.examples} test examples of {self.target}{head}"


@dataclass(frozen=True, kw_only=True)
class AnswerScore(FigureData):
    """Fraction of correct answers, and mean −log p(y|x) in nats."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class LoadedStudy:
    """The base with the head of the target's expert, and the target's test examples."""

    study: Study
    loaded: LoadedBase
    split: TestSplit
    shown: ShownExamples

    def scores(
        self, experts: Sequence[Expert], rows: Sequence[Sequence[float]], advance: Advance
    ) -> Iterator[AnswerScore]:
        """Score the base with Σ w_n ΔW_n for each row of weights w, one weight for each expert."""
        for model in at_weights(experts, rows, self.loaded):
            found = self.split.answers(model, lambda count: None)
            loss = float(found.losses.mean())
            if not math.isfinite(loss):
                names = ", ".join(expert.name for expert in experts)
                raise PimergeError(f"the loss of a sum of {names} is not finite", "pass --dtype float32")
            yield AnswerScore(accuracy=sum(found.right) / len(found.right), loss=loss)
            advance()


def load_study(study: Study, inputs: FigureInputs, limit: int, seed: int, *, padded: bool = True) -> LoadedStudy:
    """Load the base once, and encode at most ``limit`` of the target's test examples."""
    from pimerge.evaluation.scoring import read_test_split
    from pimerge.models.heads import set_head
    from pimerge.models.loading import load_base, resolve_device, resolve_dtype

    target, trains_head = study.target, study.task.type.trains_head
    if trains_head and not target.head:
        raise PimergeError(
            f"'{target.name}', the target's expert, has no head to answer with",
            f"tune one: pimerge tune --method scratch --target {target.path} --output NAME",
        )
    device = resolve_device(inputs.device)
    loaded = load_base(study.base, study.task, device, resolve_dtype(inputs.dtype, device))
    if trains_head:
        set_head(loaded.model, target.head_tensors())
    experts = [target, *study.experts]
    split = read_test_split(study.task, loaded, experts, limit=limit, seed=seed, padded=padded, note=inputs.note)
    head = target.name if trains_head else BASE
    shown = ShownExamples(target=study.task.name, head=head, examples=len(split.labels), seed=seed)
    return LoadedStudy(study, loaded, split, shown)


def at_weights(experts: Sequence[Expert], rows: Sequence[Sequence[float]], loaded: LoadedBase) -> Iterator[nn.Module]:
    """Yield the base with Σ w_n ΔW_n under its own head, for each row of weights, one after the other.

    Experts without ΔW are summed number by number, as ``merge`` does.
    """
    from pimerge.models.injection import injected_sum

    if experts[0].tensor_sets:
        for weights in rows:
            with injected_sum(experts, weights, loaded) as model:
                yield model
        return
    from peft.tuners.lora import LoraLayer

    with injected_sum(experts, [1.0] * len(experts), loaded) as model:
        names = list(model.peft_config)  # type: ignore[arg-type]
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        full = [dict(layer.scaling) for layer in layers]
        for weights in rows:
            for layer, scaling in zip(layers, full, strict=True):
                strengths = zip(names, weights, strict=True)
                layer.scaling.update({name: w * scaling[name] for name, w in strengths if name in scaling})
            yield model
