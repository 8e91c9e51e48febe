"""The family of kinds: adapter keys ↔ tensors that can be combined, one file in ``kinds/`` per kind.

A kind with an update has a :class:`~pimerge.adapters.lora_module.LoraModule` for each adapted module: a ΔW of the
base's matrix, in whatever factors it is stored. Any other kind has a :class:`~pimerge.adapters.tensor_sets.TensorSet`
for each module: tensors that are combined elementwise, around the kind's neutral point if it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PREFIX, PROMPT_PREFIX, key_of_parameter
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.tensor_sets import BaseChange, TensorSet
from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
TensorSets = Mapping[str, TensorSet]
Layers = Callable[[Sequence[str]], Shapes]
"""Names of modules → shapes of the base's weights, (d_out, d_in, *kernel)."""


def _no_layers(modules: Sequence[str]) -> Shapes:
    return {}


@dataclass(frozen=True)
class AdapterHeader:
    """The config and the tensor shapes of an adapter, known before a tensor is read.

    Attributes:
        config: the content of ``adapter_config.json``.
        shapes: key → shape of each tensor in ``adapter_model.safetensors``.
        convert: whether adapters that have to be converted with the base's weights, such as DoRA, are accepted.
        layers: gives the shapes of the base's layers, for kinds that need them.
    """

    config: Mapping[str, Any]
    shapes: Shapes
    convert: bool = False
    layers: Layers = _no_layers


Parts = tuple[Mapping[str, LoraModule | TensorSet], dict[str, str]]
"""Name → module or tensor set, in alphabetical order; and parameter name in the base → key, for the head."""


def _anywhere(part: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    model.get_submodule(part.name)
    return ""


def _no_places(model: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Kind(Strategy):
    """A kind of expert.

    Attributes:
        formula: how the expert changes its layers.
        paper: the paper that introduced it.
        peft_type: the ``peft_type`` in its ``adapter_config.json``.
        parse: reads an expert's parts and head from its header; raises every problem by name.
        slots: how the part of a key after the module's name can start, such as ``lora_``; empty for a prompt or prefix.
        key_of_parameter: parameter name in PEFT's model with adapter ``default`` → key in the file.
        has_update: whether its parts are updates ΔW of the base's matrices.
        stores_factors: whether the file holds the factors of ΔW; otherwise ΔW is computed from its tensors.
        reads_base: whether ``parse`` needs the shapes of the base's layers.
        init_slots: the tensors that identify the init from which an expert was trained.
        meaning_fields: fields of the config that two experts must share for their tensors to be comparable.
        before_text: whether it is put before a text, not into modules.
        embeds_tokens: whether it puts vectors before the embedded text.
        needs_import: whether PEFT knows it only after ``import pimerge.peft_methods``.
        why_no_update: why it has no ΔW that can be added to another's.
        base_changes: a tensor set and the config → the changes of the base's parameters with the same outputs; None
            for a kind with ΔW and for a kind that no change of parameters can stand for.
        why_not_into: why no change of the base's parameters can stand for it.
        in_one_form: the tensor sets of several experts, whose forms may differ → their tensor sets in one form, and the
            fields of the config that state it.
        fresh_fields: size and modules → fields of PEFT's config for a fresh expert; None if pimerge cannot create one.
        usual_places: further fields of that config in an architecture that PEFT does not know.
        misfit: why a tensor set does not fit a base, empty if it fits; a missing module raises AttributeError.
    """

    formula: str
    paper: str
    peft_type: str
    parse: Callable[[AdapterHeader], Parts]
    slots: tuple[str, ...] = ()
    key_of_parameter: Callable[[str], str] = key_of_parameter
    has_update: bool = False
    stores_factors: bool = False
    reads_base: bool = False
    init_slots: tuple[str, ...] = ()
    meaning_fields: tuple[str, ...] = ()
    before_text: bool = False
    embeds_tokens: bool = False
    needs_import: bool = False
    why_no_update: str = ""
    base_changes: Callable[[TensorSet, Mapping[str, Any]], Sequence[BaseChange]] | None = None
    why_not_into: str = ""
    in_one_form: Callable[[Sequence[TensorSets]], tuple[list[TensorSets], dict[str, Any]]] | None = None
    fresh_fields: Callable[[int | None, Sequence[str] | None], dict[str, Any]] | None = None
    usual_places: Callable[[nn.Module], dict[str, Any]] = _no_places
    misfit: Callable[[TensorSet, nn.Module, Mapping[str, Any]], str] = _anywhere

    @property
    def prefix(self) -> str:
        """The prefix of the base's parameter names in PEFT's model."""
        return PROMPT_PREFIX if self.before_text else PREFIX


KINDS = Family("pimerge.adapters.kinds", "kind", "KIND", Kind)
