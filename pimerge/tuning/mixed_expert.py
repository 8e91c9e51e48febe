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
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import Truncation, weighted_bias, weighted_sum
from pimerge.adapters.merged_module import MergedModule, Summary, relative_error
from pimerge.adapters.writer import Coefficients, Documents, Layout, write_expert, write_tensor_sets
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to
from pimerge.core.manifest import Manifest
from pimerge.tasks.examples import Examples
from pimerge.tuning.components import lora_components, start_logits, tensor_components
from pimerge.tuning.lora_layers import mix_lora
from pimerge.tuning.method import Granularity, MixtureKind, TuneMethod
from pimerge.tuning.mixture import ChannelMixture, Mixture, make_mixture
from pimerge.tuning.session import TrainingOutcome, TuneRequest, TuneResult
from pimerge.tuning.tensor_layers import mix_tensors
from pimerge.tuning.trainer import train, untrained


@dataclass(frozen=True)
class Collapsed:
    """A weighted sum of experts as one expert, independent of the model in which it was trained.

    Attributes:
        summaries: one for each module, with its truncation error; empty for kinds without ΔW.
        size: number of parameters, without a head.
        write: (folder, head, documents, force) → writes it.
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
        mixture: the experts' weights.
        model: the module to call.
        names: names of the experts; a fresh one comes first.
        parts: names of the modules or tensor sets that have weights.
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
        """Number of fresh experts, which are in no folder and come first."""
        return len(self.names) - len(self.chosen)

    @property
    def trains(self) -> bool:
        """Whether the head, weights or experts train."""
        parameters = (*self.mixture.parameters(), *self.model.parameters())
        return bool(self.request.session.loaded.head) or any(parameter.requires_grad for parameter in parameters)

    def train(self, kept: Examples, held_out: Examples | None, *, part: str = "", **changes: Any) -> TrainingOutcome:
        """Train the parameters in the plan, from the current state.

        Args:
            part: subfolder of the checkpoints in the request's folder.
            changes: training options that override those of the request.
        """
        request = self.request.with_options(part, **changes)
        if not self.trains:
            kind = request.session.task.file.type
            request.note(
                f"'{self.method.name}' trains nothing but a head, and {kind} has none: the experts are summed untrained"
            )
            return untrained()
        return train(request, self.model, self.mixture, kept, held_out)

    def trained_state(self) -> dict[str, Tensor]:
        """Copy every tensor that trains, by name."""
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
        """Make the result of the current state."""
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
        """The task head to write with the result.

        Args:
            tensors: name → tensor; None uses the model's current head.
        """
        session = self.request.session
        found = session.loaded.head_tensors() if tensors is None else tensors
        copied = {name: tensor.float().cpu().clone() for name, tensor in found.items()}
        return Head(copied, session.loaded.head, session.task)


class MixedUpdates(MixedExpert):
    """A weighted sum of updates, ΔW = Σ_n w_n ΔW_n."""

    def __init__(self, request: TuneRequest, method: TuneMethod, chosen: Sequence[Expert], examples: int) -> None:
        self.components = lora_components(method.plan, request, chosen)
        super().__init__(request, method, chosen, [component.name for component in self.components], examples)
        modules = {name: module for component in self.components for name, module in component.modules.items()}
        self.has_bias = any(module.bias for each in self.components for module in each.modules.values())
        self.parts = sorted(modules)
        self.mixture = self._mixture({name: module.d_out for name, module in modules.items()})
        self.model = request.session.loaded.model
        self.layers = mix_lora(self.model, self.components, self.mixture, self.plan.train_experts)

    def collapse(self, rank: int | None = None) -> Collapsed:
        """Sum the updates module by module."""
        merged = self._merged_modules(Truncation(rank))
        layout = Layout([module.module for module in merged], torch.float32, self.has_bias)
        factors = [module.factors for module in merged]
        size = sum(
            part.A.numel() + part.B.numel() + (0 if part.bias is None else part.bias.numel()) for part in factors
        )
        session = self.request.session
        kind = type(session.loaded.model)
        peft_task = session.task.type.peft_task_for(session.loaded.config)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        like = {
            "task_type": peft_task,
            "auto_mapping": None if peft_task else mapping,
            "fan_in_fan_out": any(type(layer.layer).__name__ == "Conv1D" for layer in self.layers.values()),
        }

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_expert(
                output, layout, merged, head, base=session.base, like=like, documents=lambda _: documents, force=force
            )

        return Collapsed([module.summary for module in merged], size, write)

    def _merged_modules(self, truncation: Truncation) -> list[MergedModule]:
        weights = self.mixture.weights()
        merged = []
        for name, layer in self.layers.items():
            parts = layer.parts(len(self.components))
            by_output = isinstance(self.mixture, ChannelMixture)  # then the parts contain the weights
            of_parts = [1.0] * len(parts) if by_output else weights[name]
            present = [(part, weight) for part, weight in zip(parts, of_parts, strict=True) if part is not None]
            factors, own_weights = [part for part, _ in present], [weight for _, weight in present]
            summed = weighted_sum(factors, own_weights, truncation, torch.float32)
            bias = weighted_bias(factors, own_weights, torch.float32) if self.has_bias else None
            collapsed = Factors(summed.factors.A.float(), summed.factors.B.float(), 1.0, bias)
            layout = next(each.modules[name] for each in self.components if name in each.modules)
            merged.append(MergedModule(layout, collapsed, summed.energy, summed.lost))
        return merged


class MixedTensors(MixedExpert):
    """A weighted sum of the tensors of experts without ΔW."""

    def __init__(
        self, request: TuneRequest, method: TuneMethod, chosen: Sequence[Expert], examples: int, form: Expert
    ) -> None:
        if method.plan.mixture == MixtureKind.CHANNELS:
            raise PimergeError(
                f"'{method.name}' scales the outputs of updates ΔW, and experts of kind {form.kind} have none",
                "use another --method, such as anisotropic",
            )
        components = tensor_components(method.plan, request, form, chosen)
        super().__init__(request, method, chosen, [component.name for component in components], examples)
        self.form, self.parts = form, form.parts
        self.mixture = self._mixture({})
        self.tensors = mix_tensors(request.session.loaded, form, components, self.mixture, self.plan.train_experts)
        self.model = self.tensors.model

    def collapse(self, rank: int | None = None) -> Collapsed:
        """Sum the tensors; ``rank`` does not apply."""
        tensors = self.tensors.collapsed()

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_tensor_sets(
                output,
                lambda: tensors,
                head,
                base=self.request.session.base,
                like=self.form,
                documents=lambda: documents,
                force=force,
            )

        return Collapsed([], sum(tensor.numel() for tensor in tensors.values()), write)
