"""A weighted sum of experts inside the base's model: composed, trained, collapsed into one expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.kinds.lora import Factors
from pimerge.adapters.low_rank import MergedModule, Summary, Truncation, relative_error, weighted_bias, weighted_sum
from pimerge.adapters.writer import Coefficients, Documents, Head, Layout, write_expert, write_tensor_sets
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to
from pimerge.core.manifest import Manifest
from pimerge.models.loading import set_head
from pimerge.tasks.types import Examples, for_base
from pimerge.tuning.components import chosen_experts, form_of, group_members, members, require_heads_alone, start_logits
from pimerge.tuning.lora_layers import ChannelMixture, ComposedLinear, FreeMixture, Member, Mixture, Switch, compose
from pimerge.tuning.methods import Plan
from pimerge.tuning.session import Fitted, Job
from pimerge.tuning.tensor_layers import GroupMember, compose_groups
from pimerge.tuning.trainer import Outcome, train, untrained


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


class Composed(ABC):
    """A sum of experts in the base of a job.

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
        job: Job,
        plan: Plan,
        method: str,
        chosen: Sequence[Expert],
        names: list[str],
        fresh: bool,
        examples: int,
    ) -> None:
        self.job, self.plan, self.method = job, plan, method
        self.chosen, self.names, self.fresh = chosen, names, fresh
        self.start = start_logits(plan, len(names), job, chosen, examples)

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
        return bool(self.job.bench.loaded.head) or any(parameter.requires_grad for parameter in parameters)

    def train(self, kept: Examples, held_out: Examples | None, **changes: Any) -> Outcome:
        """Train what the plan says on these examples, from where it is.

        Args:
            changes: to the job's options; ``part``, the folder of the checkpoints in that of the job.
        """
        job = self.job.with_options(changes.pop("part", ""), **changes)
        if not self.trains:
            kind = job.bench.task.file.type
            job.note(
                f"'{self.method}' trains nothing but a head, and {kind} has none: the experts are summed as they are"
            )
            return untrained()
        return train(
            job.bench.loaded,
            self.mixture,
            kept,
            held_out,
            job.run,
            job.options,
            job.bench.precision,
            through=self.model,
            track=job.track,
            note=job.note,
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
        head = set(self.job.bench.loaded.head_parameters())
        return {name: each for name, each in both.named_parameters() if each.requires_grad or each in head}

    def fitted(self, outcome: Outcome, kept: Examples, held_out: Examples | None) -> Fitted:
        """The result as it is now."""
        collapsed = self.collapse(self.job.options.rank)
        head = self.head()
        replaced = self.plan.random_experts
        scales = [1.0 if replaced and expert is not self.job.target else expert.strength for expert in self.chosen]
        weights = self.mixture.weights()

        def write(output: Path, manifest: Manifest, force: bool) -> None:
            coefficients = Coefficients(
                method=self.method,
                granularity=self.plan.granularity or self.job.options.granularity,
                experts=[relative_to(expert.path, output) for expert in self.chosen],
                sha256=[expert.sha256 for expert in self.chosen],
                scales=scales,
                experts_trained=self.plan.train_experts or self.plan.mixture == "channels",
                weights=weights,
            )
            documents = Documents(manifest, None if self.fresh or self.plan.random_experts else coefficients)
            collapsed.write(output, head, documents, force)

        return Fitted(
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
        bench = self.job.bench
        found = bench.loaded.head_tensors() if tensors is None else tensors
        copied = {name: tensor.float().cpu().clone() for name, tensor in found.items()}
        return Head(copied, bench.loaded.head, bench.task)


class _Updates(Composed):
    """A sum of updates ΔW."""

    def __init__(self, job: Job, plan: Plan, method: str, chosen: Sequence[Expert], examples: int) -> None:
        self.members: list[Member]
        self.members, fresh = members(plan, job, chosen)
        super().__init__(job, plan, method, chosen, [member.name for member in self.members], fresh, examples)
        self.parts = sorted({name for member in self.members for name in member.modules})
        widths = {name: module.d_out for member in self.members for name, module in member.modules.items()}
        self.mixture = _mixture(plan, job, self.parts, self.start, widths)
        self.model = job.bench.loaded.model
        self.layers = compose(self.model, self.members, self.mixture, plan.train_experts)

    def collapse(self, rank: int | None = None) -> Collapsed:
        """The sum of the updates, module by module."""
        layout, merged = _collapse(self.layers, self.members, self.mixture, Truncation(rank))
        factors = [module.factors for module in merged]
        size = sum(
            part.A.numel() + part.B.numel() + (0 if part.bias is None else part.bias.numel()) for part in factors
        )
        bench = self.job.bench
        kind = type(bench.loaded.model)
        peft_task = for_base(bench.task.type.PEFT_TASK, bench.loaded.config)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        like = {
            "task_type": peft_task,
            "auto_mapping": None if peft_task else mapping,
            "fan_in_fan_out": any(type(layer.layer).__name__ == "Conv1D" for layer in self.layers.values()),
        }

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_expert(
                output, layout, merged, head, base=bench.base, like=like, documents=lambda _: documents, force=force
            )

        return Collapsed([module.summary for module in merged], size, write)


class _Groups(Composed):
    """A sum of experts without ΔW: of their tensors."""

    def __init__(
        self, job: Job, plan: Plan, method: str, chosen: Sequence[Expert], examples: int, form: Expert
    ) -> None:
        if plan.mixture == "channels":
            raise PimergeError(
                f"'{method}' scales the outputs of updates ΔW, and experts of kind {form.kind} have none",
                "take another --method, such as anisotropic",
            )
        found: list[GroupMember]
        found, fresh = group_members(plan, job, form, chosen)
        super().__init__(job, plan, method, chosen, [member.name for member in found], fresh, examples)
        self.form, self.parts = form, form.parts
        self.mixture = _mixture(plan, job, self.parts, self.start, {})
        self.composition = compose_groups(job.bench.loaded, form, found, self.mixture, plan.train_experts)
        self.model = self.composition.model

    def collapse(self, rank: int | None = None) -> Collapsed:
        """The sum of the tensors; nothing is cut off."""
        tensors = self.composition.collapsed()

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_tensor_sets(
                output,
                lambda: tensors,
                head,
                base=self.job.bench.base,
                like=self.form,
                documents=lambda: documents,
                force=force,
            )

        return Collapsed([], sum(tensor.numel() for tensor in tensors.values()), write)


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name → mean of several tensors, as :meth:`Composed.trained_state` has them.

    >>> mean_state([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
    {'w': tensor([0.5000])}
    """
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
    """Name → start + way · (end − start), of what :meth:`Composed.trained_state` gave.

    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.75)
    {'w': tensor([1.5000])}
    """
    return {name: start[name] + way * (end[name] - start[name]) for name in start}


def compose_sum(job: Job, plan: Plan, method: str) -> tuple[Composed, Examples, Examples | None]:
    """Put the sum that a plan asks for into the base, and encode the examples for it.

    Returns:
        the sum, what to train on, and what is held out.

    Raises:
        PimergeError: if the experts, the task or an option has a problem.
    """
    bench = job.bench
    chosen = chosen_experts(plan, method, job.experts, job.target)
    if plan.head_alone and not bench.loaded.head:
        raise PimergeError(
            f"'{method}' trains a head alone, and a base that answers in text ({bench.task.file.type}) has none to "
            "train",
            "take 'scratch' for a control without experts; 'pimerge eval' scores the bare base, too",
        )
    require_heads_alone([*chosen, *([job.target] if job.target and plan.target else [])], bench.loaded)
    if plan.target and job.target is not None:
        set_head(bench.loaded.model, job.target.head_tensors())
    with form_of(plan, job, chosen) as form:
        kept, held_out = job.examples(form)
        count = len(kept) + (len(held_out) if held_out else 0)
        composed: Composed = (
            _Updates(job, plan, method, chosen, count)
            if form is None
            else _Groups(job, plan, method, chosen, count, form)
        )
    composed.mixture.to(bench.device)
    return composed, kept, held_out


def train_sum(job: Job, plan: Plan, method: str) -> Fitted:
    """Compose, train, collapse: what most tune methods are.

    Raises:
        PimergeError: as :func:`compose_sum`, or if the training diverges.
    """
    composed, kept, held_out = compose_sum(job, plan, method)
    outcome = composed.train(kept, held_out)
    return composed.fitted(outcome, kept, held_out)


def _mixture(plan: Plan, job: Job, parts: Sequence[str], start: Sequence[float], widths: dict[str, int]) -> Mixture:
    trained = plan.train_weights and (len(start) > 1 or plan.mixture != "softmax")
    granularity = plan.granularity or job.options.granularity
    if plan.mixture == "switch":
        return Switch(parts, len(start))
    if plan.mixture == "channels":
        return ChannelMixture(widths, start, granularity, trained)
    kind = FreeMixture if plan.mixture == "free" else Mixture
    return kind(parts, start, granularity, trained)


def _collapse(
    layers: dict[str, ComposedLinear], found: Sequence[Member], mixture: Mixture, truncation: Truncation
) -> tuple[Layout, list[MergedModule]]:
    """The trained sum as one expert, module by module."""
    weights = mixture.weights()
    layouts = {name: next(m.modules[name] for m in found if name in m.modules) for name in layers}
    has_bias = any(module.bias for member in found for module in member.modules.values())
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
