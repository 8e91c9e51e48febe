"""Several experts without ΔW inside one model: every tensor is Σ_n α_n φ_n, computed in the forward pass.

PEFT's model has one adapter. Each of its parameters is parametrised by the stacked tensors of the experts (N × shape)
and the weights α of its tensor set. So tuning costs one adapter's forward pass, and the export is the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from pimerge.adapters.additive_tensors import sum_of
from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.expert import Expert
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.models.injection import fresh_adapter_like, modules_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.tuning.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorComponent:
    """A component of a mixture: an expert's tensors by key, at its strength."""

    name: str
    tensors: Mapping[str, Tensor]


class MixedTensor(nn.Module):
    """Σ_n α_n φ_n in place of a parameter; columns of a prefix have the weights of their layer.

    Args:
        stack: (N, *shape) the experts' tensors.
        groups: name of a tensor set → columns of the tensor that belong to it; None means all columns.
        neutral: (*shape) the neutral point φ0 of Σ_n α_n φ_n + (1 − Σ_n α_n) φ0.
        trained: whether the experts' tensors train.
    """

    neutral: Tensor

    def __init__(
        self,
        stack: Tensor,
        neutral: Tensor,
        groups: Mapping[str, tuple[int, int] | None],
        mixture: Mixture,
        trained: bool,
    ) -> None:
        super().__init__()
        self.stack = nn.Parameter(stack, trained)
        self.register_buffer("neutral", neutral, persistent=False)
        self.groups, self.mixture = dict(groups), mixture

    def forward(self, original: Tensor) -> Tensor:
        """The sum, in the dtype of the replaced parameter."""
        parts = []
        for group, columns in self.groups.items():
            span = slice(None) if columns is None else slice(*columns)
            part = self.stack[..., span]
            weights = self.mixture(group).to(part)
            total = torch.tensordot(weights, part, 1)
            if not self.mixture.sums_to_one:
                total = total + (1 - weights.sum()) * self.neutral[..., span]
            parts.append(total)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(original.dtype)


class ByLength(nn.Module):
    """A classifier that splits batches into texts of equal length, so that nothing is padded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor, **batch: Tensor) -> Any:
        """The logits of every text, equal to those of each text alone."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        real = attention_mask.bool()
        lengths = real.sum(1)
        found: list[Tensor] = [attention_mask.new_empty(0)] * len(lengths)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            alike = {name: value[rows] for name, value in {"attention_mask": attention_mask, **batch}.items()}
            inputs = {name: value[real[rows]].view(len(rows), length) for name, value in alike.items()}
            for row, logits in zip(rows.tolist(), self.model(**inputs).logits, strict=True):
                found[row] = logits
        return SequenceClassifierOutput(logits=torch.stack(found))


@dataclass(frozen=True)
class TensorMixture:
    """A model whose adapter is the sum of several experts.

    Attributes:
        model: PEFT's model, which also inserts prompts.
        mixed: key → the sum that replaces its parameter.
    """

    model: nn.Module
    mixed: Mapping[str, MixedTensor]

    def collapsed(self) -> dict[str, Tensor]:
        """Map each key to the current sum, in float32."""
        with torch.no_grad():
            return {key: each(each.stack[0]).float().cpu() for key, each in self.mixed.items()}


def component_of(expert: Expert, loaded: LoadedBase) -> TensorComponent:
    """Make an expert a component of a mixture."""
    check_fits(expert, loaded.model, head=False)
    return TensorComponent(expert.name, sum_of([expert], [1.0], loaded.model.get_parameter))


def fresh_component(like: Expert, loaded: LoadedBase, seed: int, name: str = "fresh") -> TensorComponent:
    """Make a fresh component shaped like an expert, with PEFT's own init; the base stays unchanged."""
    check_fits(like, loaded.model, head=False)
    torch.manual_seed(seed)
    with modules_restored(loaded.model):
        parameters = _parameters(like, fresh_adapter_like(like, loaded.model))
        return TensorComponent(
            name, {key: parameter.detach().double().cpu() for key, (_, parameter) in parameters.items()}
        )


def mix_tensors(
    loaded: LoadedBase, form: Expert, components: Sequence[TensorComponent], mixture: Mixture, trained: bool
) -> TensorMixture:
    """Put the weighted sum of several experts into a base.

    Args:
        form: an expert with the same tensors as all components.
        trained: whether the tensors train.
    """
    model = fresh_adapter_like(form, loaded.model)
    for name in loaded.head:  # train the base's own head, not PEFT's copy
        wrapper = loaded.model.get_submodule(name)
        loaded.model.set_submodule(name, getattr(wrapper, "original_module", wrapper))
    model.requires_grad_(False)
    columns: dict[str, dict[str, tuple[int, int] | None]] = {}
    groups: Mapping[str, TensorSet] = form.tensor_sets
    for group in groups.values():
        for slot in group.slots.values():
            columns.setdefault(slot.key, {})[group.name] = slot.columns
    mixed = {}
    neutral = sum_of([form], [0.0], loaded.model.get_parameter)
    for key, (path, parameter) in _parameters(form, model).items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)  # trained and summed in float32 at least
        stack = torch.stack([component.tensors[key] for component in components]).to(parameter.device, dtype)
        mixed[key] = MixedTensor(stack, neutral[key].to(stack), columns[key], mixture, trained)
        owner, _, name = path.rpartition(".")
        register_parametrization(model.get_submodule(owner), name, mixed[key])
    # behind a prompt's vectors, a causal model cannot recognise padding
    behind_vectors = form.virtual_tokens and "score" in loaded.head
    return TensorMixture(ByLength(model) if behind_vectors else model, mixed)


def _parameters(expert: Expert, model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Map each key to its name and parameter in PEFT's model."""
    key_of = expert.strategy.key_of_parameter
    wanted = set(expert.keys)
    return {key_of(name): (name, each) for name, each in list(model.named_parameters()) if key_of(name) in wanted}
