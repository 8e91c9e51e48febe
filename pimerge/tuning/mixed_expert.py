"""Several experts as one weighted sum inside the base's model: train it, collapse it into one expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.merged_module import Summary, relative_error
from pimerge.adapters.writer import Coefficients, Documents
from pimerge.core.files import relative_to
from pimerge.core.manifest import Manifest
from pimerge.tasks.examples import Examples
from pimerge.tuning.components import start_logits
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.mixture import Mixture, make_mixture
from pimerge.tuning.plan import Granularity, MixtureKind
from pimerge.tuning.session import TuneRequest, TuneResult
from pimerge.tuning.trainer import TrainingOutcome, untrained


@dataclass(frozen=True)
class Collapsed:
    """A sum of experts as one expert, independent of the model in which it was trained.

    Attributes:
        summaries: one for each module, with what cutting its rank lost; none for kinds without ΔW.
        size: how many numbers it has, without a head.
        write: (folder, head, documents, whether to replace what is there) writes it.
    """

    summaries: Sequence[Summary]
    size: int
    write: Callable[[Path, Head, Documents, bool], object]

    @property
    def rank(self) -> int:
        """The highest rank of a module; 0 for kinds without ΔW."""
        return max((summary.rank for summary in self.summaries), default=0)


class MixedExpert(ABC):
    """A weighted sum of experts in the base of a session.

    Attributes:
        mixture: the weights.
        model: the module that answers.
        names: the experts in the sum; a fresh one is the first.
        parts: names of what has weights: modules, or tensor sets.
    """

    mixture: Mixture
    model: nn.Module
    parts: Sequence[str]

    def __init__(
        self, request: TuneRequest, method: TuneMethod, chosen: Sequence[Expert], names: list[str], examples: int
    ) -> None:
        self.request, self.method, self.plan = request, method, method.plan
        self.chosen, self.names = chosen, names
        self.start = start_logits(self.plan, len(names), request, chosen, examples)

    @abstractmethod
    def collapse(self, rank: int | None = None) -> Collapsed:
        """Turn the sum, in its current state, into one expert.

        Args:
            rank: the highest rank of a module; None keeps every direction.
        """

    def _mixture(self, widths: Mapping[str, int]) -> Mixture:
        granularity = Granularity(self.request.options.granularity)
        return make_mixture(self.plan, granularity, self.parts, self.start, widths)

    @property
    def fresh(self) -> int:
        """How many of the experts no folder holds; they come first."""
        return len(self.names) - len(self.chosen)

    @property
    def trains(self) -> bool:
        """Whether anything trains: the head, weights or experts."""
        parameters = (*self.mixture.parameters(), *self.model.parameters())
        return bool(self.request.session.loaded.head) or any(parameter.requires_grad for parameter in parameters)

    def train(self, kept: Examples, held_out: Examples | None, *, part: str = "", **changes: Any) -> TrainingOutcome:
        """Train what the plan says on these examples, from the current state.

        Args:
            part: folder of the checkpoints inside that of the request.
            changes: training options that differ from those of the request.
        """
        request = self.request.with_options(part, **changes)
        if not self.trains:
            kind = request.session.task.file.type
            request.note(
                f"'{self.method.name}' trains nothing but a head, and {kind} has none: the experts are summed untrained"
            )
            return untrained()
        return request.train(self.model, self.mixture, kept, held_out)

    def trained_state(self) -> dict[str, Tensor]:
        """Name → a copy of every tensor that trains."""
        return {name: parameter.detach().clone() for name, parameter in self._trainable().items()}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`trained_state` returned."""
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(state[name])

    def _trainable(self) -> dict[str, nn.Parameter]:
        both = nn.ModuleDict({"model": self.model, "mixture": self.mixture})
        head = set(self.request.session.loaded.head_parameters())
        return {name: each for name, each in both.named_parameters() if each.requires_grad or each in head}

    def result(self, outcome: TrainingOutcome, kept: Examples, held_out: Examples | None) -> TuneResult:
        """The result in the current state."""
        collapsed, head = self.collapse(self.request.options.rank), self.head()
        replaced = self.plan.random_experts
        scales = [1.0 if replaced and expert is not self.request.target else expert.strength for expert in self.chosen]
        weights = self.mixture.weights()

        def write(output: Path, manifest: Manifest, force: bool) -> None:
            coefficients = Coefficients(
                method=self.method.name,
                granularity=self.plan.granularity or self.request.options.granularity,
                experts=[relative_to(expert.path, output) for expert in self.chosen],
                sha256=[expert.sha256 for expert in self.chosen],
                scales=scales,
                experts_trained=self.plan.train_experts or self.plan.mixture == MixtureKind.CHANNELS,
                weights=weights,
            )
            documents = Documents(manifest, None if self.fresh or replaced else coefficients)
            collapsed.write(output, head, documents, force)

        return TuneResult(
            model=self.model,
            outcome=outcome,
            experts=self.names,
            weights=weights,
            scales=[1.0] * self.fresh + scales,
            examples=len(kept),
            held_out=len(held_out) if held_out else 0,
            rank=collapsed.rank,
            truncation=relative_error(collapsed.summaries),
            deployed_parameters=collapsed.size + sum(tensor.numel() for tensor in head.tensors.values()),
            settings={"start": self.start, "scales": scales},
            write=write,
        )

    def head(self, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The head that is written beside the sum.

        Args:
            tensors: name → tensor; None for the model's current ones.
        """
        session = self.request.session
        found = session.loaded.head_tensors() if tensors is None else tensors
        copied = {name: tensor.float().cpu().clone() for name, tensor in found.items()}
        return Head(copied, session.loaded.head, session.task)
