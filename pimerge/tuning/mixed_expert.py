"""A weighted sum of experts inside the base's model: mixed, trained, collapsed into one expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import MergedModule, Summary, Truncation, relative_error, weighted_bias, weighted_sum
from pimerge.adapters.writer import Coefficients, Documents, Head, Layout, write_expert, write_tensor_sets
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to
from pimerge.core.manifest import Manifest
from pimerge.models.heads import set_head
from pimerge.tasks.examples import Examples
from pimerge.tasks.task_type import for_base
from pimerge.tuning.components import (
    chosen_experts,
    form_of,
    lora_components,
    require_heads_alone,
    start_logits,
    tensor_components,
)
from pimerge.tuning.lora_layers import (
    ChannelMixture,
    FreeMixture,
    LoraComponent,
    MixedLinear,
    Mixture,
    Switch,
    mix_lora,
)
from pimerge.tuning.methods import MixturePlan
from pimerge.tuning.session import TuneRequest, TuneResult
from pimerge.tuning.tensor_layers import TensorComponent, mix_tensors
from pimerge.tuning.trainer import TrainingOutcome, train, untrained


@dataclass(frozen=True)
class Collapsed:
    """A sum of experts as one, apart from the model that it was trained in.

    Attributes:
        summaries: of its modules, with what cutting their rank lost; none for kinds without ΔW.
        size: numbers in it, without a head.
        write: puts it into a folder with a head and documents; the last says whether to replace one.
    """

    summaries: Sequence[Summary]
    size: int
    write: Callable[[Path, Head, Documents, bool], object]

    @property
    def rank(self) -> int:
        """The highest of a module; 0 for kinds without ΔW."""
        return max((summary.rank for summary in self.summaries), default=0)


class MixedExpert(ABC):
    """A sum of experts in the base of a request.

    Attributes:
        mixture: the weights.
        model: the module that answers.
        names: of the experts in the sum; a fresh one is the first.
        parts: names of what has weights: modules, or groups of tensors.
    """

    model: nn.Module
    mixture: Mixture
    parts: Sequence[str]

    def __init__(
        self,
        request: TuneRequest,
        plan: MixturePlan,
        method: str,
        chosen: Sequence[Expert],
        names: list[str],
        fresh: bool,
        examples: int,
    ) -> None:
        self.request, self.plan, self.method = request, plan, method
        self.chosen, self.names, self.fresh = chosen, names, fresh
        self.start = start_logits(plan, len(names), request, chosen, examples)

    @abstractmethod
    def collapse(self, rank: int | None = None) -> Collapsed:
        """The sum as it is now, as one expert.

        Args:
            rank: that it has at most; None for what nothing is lost by.
        """

    @property
    def trains(self) -> bool:
        """Whether anything does: the head, weights or experts."""
        parameters = (*self.mixture.parameters(), *self.model.parameters())
        return bool(self.request.session.loaded.head) or any(parameter.requires_grad for parameter in parameters)

    def train(self, kept: Examples, held_out: Examples | None, **changes: Any) -> TrainingOutcome:
        """Train what the plan says on these examples, from where it is.

        Args:
            changes: to the request's options; ``part``, the folder of the checkpoints in that of the request.
        """
        request = self.request.with_options(changes.pop("part", ""), **changes)
        if not self.trains:
            kind = request.session.task.file.type
            request.note(
                f"'{self.method}' trains nothing but a head, and {kind} has none: the experts are summed as they are"
            )
            return untrained()
        return train(
            request.session.loaded,
            self.mixture,
            kept,
            held_out,
            request.run,
            request.options,
            request.session.precision,
            through=self.model,
            track=request.track,
            note=request.note,
        )

    def trained_state(self) -> dict[str, Tensor]:
        """Name → a copy of every tensor that trains."""
        return {name: parameter.detach().clone() for name, parameter in self._trainable().items()}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`trained_state` gave."""
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(state[name])

    def _trainable(self) -> dict[str, nn.Parameter]:
        both = nn.ModuleDict({"model": self.model, "mixture": self.mixture})
        head = set(self.request.session.loaded.head_parameters())
        return {name: each for name, each in both.named_parameters() if each.requires_grad or each in head}

    def result(self, outcome: TrainingOutcome, kept: Examples, held_out: Examples | None) -> TuneResult:
        """The result as it is now."""
        collapsed = self.collapse(self.request.options.rank)
        head = self.head()
        replaced = self.plan.random_experts
        scales = [1.0 if replaced and expert is not self.request.target else expert.strength for expert in self.chosen]
        weights = self.mixture.weights()

        def write(output: Path, manifest: Manifest, force: bool) -> None:
            coefficients = Coefficients(
                method=self.method,
                granularity=self.plan.granularity or self.request.options.granularity,
                experts=[relative_to(expert.path, output) for expert in self.chosen],
                sha256=[expert.sha256 for expert in self.chosen],
                scales=scales,
                experts_trained=self.plan.train_experts or self.plan.mixture == "channels",
                weights=weights,
            )
            documents = Documents(manifest, None if self.fresh or self.plan.random_experts else coefficients)
            collapsed.write(output, head, documents, force)

        return TuneResult(
            model=self.model,
            outcome=outcome,
            experts=self.names,
            weights=weights,
            scales=[1.0] * (len(self.names) - len(self.chosen)) + scales,  # a fresh one goes first
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
            tensors: name → tensor; None for the model's, as it is now.
        """
        session = self.request.session
        found = session.loaded.head_tensors() if tensors is None else tensors
        copied = {name: tensor.float().cpu().clone() for name, tensor in found.items()}
        return Head(copied, session.loaded.head, session.task)


class _MixedUpdates(MixedExpert):
    """A sum of updates ΔW."""

    def __init__(
        self, request: TuneRequest, plan: MixturePlan, method: str, chosen: Sequence[Expert], examples: int
    ) -> None:
        self.components: list[LoraComponent]
        self.components, fresh = lora_components(plan, request, chosen)
        super().__init__(
            request, plan, method, chosen, [component.name for component in self.components], fresh, examples
        )
        self.parts = sorted({name for component in self.components for name in component.modules})
        widths = {name: module.d_out for component in self.components for name, module in component.modules.items()}
        self.mixture = _mixture(plan, request, self.parts, self.start, widths)
        self.model = request.session.loaded.model
        self.layers = mix_lora(self.model, self.components, self.mixture, plan.train_experts)

    def collapse(self, rank: int | None = None) -> Collapsed:
        """The sum of the updates, module by module."""
        layout, merged = _collapse(self.layers, self.components, self.mixture, Truncation(rank))
        factors = [module.factors for module in merged]
        size = sum(
            part.A.numel() + part.B.numel() + (0 if part.bias is None else part.bias.numel()) for part in factors
        )
        session = self.request.session
        kind = type(session.loaded.model)
        peft_task = for_base(session.task.type.PEFT_TASK, session.loaded.config)
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


class _MixedTensors(MixedExpert):
    """A sum of experts without ΔW: of their tensors."""

    def __init__(
        self,
        request: TuneRequest,
        plan: MixturePlan,
        method: str,
        chosen: Sequence[Expert],
        examples: int,
        form: Expert,
    ) -> None:
        if plan.mixture == "channels":
            raise PimergeError(
                f"'{method}' scales the outputs of updates ΔW, and experts of kind {form.kind} have none",
                "take another --method, such as anisotropic",
            )
        found: list[TensorComponent]
        found, fresh = tensor_components(plan, request, form, chosen)
        super().__init__(request, plan, method, chosen, [component.name for component in found], fresh, examples)
        self.form, self.parts = form, form.parts
        self.mixture = _mixture(plan, request, self.parts, self.start, {})
        self.composition = mix_tensors(request.session.loaded, form, found, self.mixture, plan.train_experts)
        self.model = self.composition.model

    def collapse(self, rank: int | None = None) -> Collapsed:
        """The sum of the tensors; nothing is cut off."""
        tensors = self.composition.collapsed()

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


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name → mean of several tensors, as :meth:`MixedExpert.trained_state` has them.

    >>> mean_state([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
    {'w': tensor([0.5000])}
    """
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
    """Name → start + way · (end − start), of what :meth:`MixedExpert.trained_state` gave.

    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.75)
    {'w': tensor([1.5000])}
    """
    return {name: start[name] + way * (end[name] - start[name]) for name in start}


def mix_experts(request: TuneRequest, plan: MixturePlan, method: str) -> tuple[MixedExpert, Examples, Examples | None]:
    """Put the sum that a plan asks for into the base, and encode the examples for it.

    Returns:
        the sum, what to train on, and what is held out.

    Raises:
        PimergeError: if the experts, the task or an option has a problem.
    """
    session = request.session
    chosen = chosen_experts(plan, method, request.experts, request.target)
    if plan.head_alone and not session.loaded.head:
        raise PimergeError(
            f"'{method}' trains a head alone, and a base that answers in text ({session.task.file.type}) has none to "
            "train",
            "take 'scratch' for a control without experts; 'pimerge eval' scores the bare base, too",
        )
    require_heads_alone([*chosen, *([request.target] if request.target and plan.target else [])], session.loaded)
    if plan.target and request.target is not None:
        set_head(session.loaded.model, request.target.head_tensors())
    with form_of(plan, request, chosen) as form:
        kept, held_out = request.examples(form)
        count = len(kept) + (len(held_out) if held_out else 0)
        mixed: MixedExpert = (
            _MixedUpdates(request, plan, method, chosen, count)
            if form is None
            else _MixedTensors(request, plan, method, chosen, count, form)
        )
    mixed.mixture.to(session.device)
    return mixed, kept, held_out


def train_mixture(request: TuneRequest, plan: MixturePlan, method: str) -> TuneResult:
    """Compose, train, collapse: what most tune methods are.

    Raises:
        PimergeError: as :func:`mix_experts`, or if the training diverges.
    """
    mixed, kept, held_out = mix_experts(request, plan, method)
    outcome = mixed.train(kept, held_out)
    return mixed.result(outcome, kept, held_out)


def _mixture(
    plan: MixturePlan, request: TuneRequest, parts: Sequence[str], start: Sequence[float], widths: dict[str, int]
) -> Mixture:
    trained = plan.train_weights and (len(start) > 1 or plan.mixture != "softmax")
    granularity = plan.granularity or request.options.granularity
    if plan.mixture == "switch":
        return Switch(parts, len(start))
    if plan.mixture == "channels":
        return ChannelMixture(widths, start, granularity, trained)
    kind = FreeMixture if plan.mixture == "free" else Mixture
    return kind(parts, start, granularity, trained)


def _collapse(
    layers: dict[str, MixedLinear], found: Sequence[LoraComponent], mixture: Mixture, truncation: Truncation
) -> tuple[Layout, list[MergedModule]]:
    """The trained sum as one expert, module by module."""
    weights = mixture.weights()
    layouts = {name: next(c.modules[name] for c in found if name in c.modules) for name in layers}
    has_bias = any(module.bias for component in found for module in component.modules.values())
    merged = []
    for name, layer in layers.items():
        parts = layer.parts(len(found))
        by_output = isinstance(mixture, ChannelMixture)  # then the parts have them, already
        shares = [1.0] * len(parts) if by_output else weights[name]
        present = [(part, w) for part, w in zip(parts, shares, strict=True) if part is not None]
        factors, shares = [part for part, _ in present], [w for _, w in present]
        summed = weighted_sum(factors, shares, truncation, torch.float32)
        bias = weighted_bias(factors, shares, torch.float32) if has_bias else None
        collapsed = Factors(summed.factors.A.float(), summed.factors.B.float(), 1.0, bias)
        merged.append(MergedModule(layouts[name], collapsed, summed.energy, summed.lost))
    return Layout(list(layouts.values()), torch.float32, has_bias), merged
