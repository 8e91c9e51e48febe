"""A target with an expert of its own, other experts, and the sums of them on the target's test examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, FiniteFloat

from pimerge.core.errors import PimergeError
from pimerge.reporting.figures import Options

if TYPE_CHECKING:
    from torch import nn

    from pimerge.adapters.expert import Expert
    from pimerge.checkpoints.base import Base
    from pimerge.core.progress import Advance
    from pimerge.evaluation.evaluate import TestSplit
    from pimerge.models.loaded_base import LoadedBase
    from pimerge.tasks.task import Task

BASE = "(base)"


@dataclass(frozen=True)
class Study:
    """Whose experts are looked at.

    Attributes:
        target: the target's own expert.
        experts: the others, at full strength, best first.
        left_out: name → why it cannot be combined with the target's expert.
    """

    target: Expert
    task: Task
    base: Base
    experts: Sequence[Expert]
    left_out: dict[str, str] = field(default_factory=dict)


class Shown(BaseModel):
    """Whose test examples a plot is about.

    Attributes:
        head: whose answers: the name of the target's expert, or ``(base)`` where the base answers in text.
        examples: of the test split, drawn by the seed.
    """

    model_config = ConfigDict(extra="forbid")

    target: str
    head: str
    examples: int
    seed: int

    def sentence(self) -> str:
        """For a title."""
        head = "" if self.head == BASE else f", the head of {self.head}"
        return f"{self.examples} test examples of {self.target}{head}"


class Point(BaseModel):
    """Share of right answers, and mean −log p(y|x) in nats."""

    model_config = ConfigDict(extra="forbid")

    accuracy: FiniteFloat
    loss: FiniteFloat


@dataclass(frozen=True)
class Examined:
    """The base under the head of the target's expert, and the target's test examples."""

    study: Study
    loaded: LoadedBase
    split: TestSplit
    shown: Shown

    def scores(self, experts: Sequence[Expert], rows: Sequence[Sequence[float]], advance: Advance) -> Iterator[Point]:
        """What the base with Σ w_n ΔW_n answers, for each row of weights w (one for each expert).

        Raises:
            PimergeError: if a loss is not finite.
        """
        for model in at_weights(experts, rows, self.loaded):
            found = self.split.answers(model, lambda count: None)
            loss = float(found.losses.mean())
            if not math.isfinite(loss):
                names = ", ".join(expert.name for expert in experts)
                raise PimergeError(f"the loss of a sum of {names} is not finite", "pass --dtype float32")
            yield Point(accuracy=sum(found.right) / len(found.right), loss=loss)
            advance()


def examined(study: Study, options: Options, *, padded: bool = True) -> Examined:
    """Load the base once, and encode the target's test examples.

    Raises:
        PimergeError: if the target's expert has no head where one is needed, or the base or the data has a problem.
    """
    from pimerge.evaluation.evaluate import read_test_split
    from pimerge.models.heads import set_head
    from pimerge.models.loading import load_base, resolve_device, resolve_dtype

    target, trains_head = study.target, study.task.type.TRAINS_HEAD
    if trains_head and not target.head:
        raise PimergeError(
            f"'{target.name}', the target's expert, has no head to answer with",
            f"tune one: pimerge tune --method scratch --target {target.path} --output NAME",
        )
    device = resolve_device(options.device)
    loaded = load_base(study.base, study.task, device, resolve_dtype(options.dtype, device))
    if trains_head:
        set_head(loaded.model, target.head_tensors())
    experts = [target, *study.experts]
    split = read_test_split(
        study.task, loaded, experts, limit=options.limit, seed=options.seed, padded=padded, note=options.note
    )
    head = target.name if trains_head else BASE
    shown = Shown(target=study.task.name, head=head, examples=len(split.labels), seed=options.seed)
    return Examined(study, loaded, split, shown)


def at_weights(experts: Sequence[Expert], rows: Sequence[Sequence[float]], loaded: LoadedBase) -> Iterator[nn.Module]:
    """The base with Σ w_n ΔW_n under its own head, for each row of weights, one after the other.

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
