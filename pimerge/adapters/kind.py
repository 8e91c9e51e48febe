"""The family of kinds: adapter keys ↔ tensors that can be combined, one file in ``kinds/`` per kind.

The parts of an expert are of two sorts. A kind with an update has a :class:`~pimerge.adapters.lora_module.LoraModule`
for each adapted module: a ΔW of the base's matrix, combined whatever factors it is stored in. The parts of every other
kind are :class:`~pimerge.adapters.tensor_sets.TensorSet`: tensors that are combined number by number, around the kind's
neutral point where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PREFIX, PROMPT_PREFIX
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
Layers = Callable[[Sequence[str]], Shapes]
"""Names of modules → shapes of the base's weights, (d_out, d_in, *kernel)."""


def _no_layers(modules: Sequence[str]) -> Shapes:
    return {}


@dataclass(frozen=True)
class AdapterHeader:
    """Everything known about an adapter before a tensor is read.

    Attributes:
        config: the content of ``adapter_config.json``.
        shapes: the shape of each tensor of ``adapter_model.safetensors``.
        convert: accept what has to be converted with the base's weights, such as DoRA.
        layers: the shapes of the base's layers, for kinds that need them.
    """

    config: Mapping[str, Any]
    shapes: Shapes
    convert: bool = False
    layers: Layers = _no_layers


Parts = tuple[Mapping[str, LoraModule | TensorSet], dict[str, str]]
"""Name → module or tensor set, in alphabetical order; and the head's parameter name in the base → its key."""


def _anywhere(part: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    model.get_submodule(part.name)
    return ""


def _no_places(model: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Kind(Strategy):
    """A kind of expert.

    Attributes:
        formula: what the expert does to its layers.
        paper: where it comes from.
        peft_type: the ``peft_type`` of its ``adapter_config.json``.
        parse: the expert's parts and head; all that cannot be handled is raised, by name.
        key_of_parameter: the file's key for the name of a parameter of PEFT's model with adapter ``default``.
        has_update: whether its parts are updates ΔW of the base's matrices.
        stores_factors: whether the file holds the factors of ΔW themselves; else ΔW is computed from its tensors.
        reads_base: whether ``parse`` asks for the shapes of the base's layers.
        init_slots: the tensors that tell from which init an expert was trained.
        meaning_fields: fields of the config that say what its tensors mean.
        before_text: whether it stands before a text, not in modules.
        embeds_tokens: whether it puts vectors before the embedded text.
        needs_import: whether PEFT knows it only after ``import pimerge.peft_methods``.
        why_no_update: why it has no ΔW that could be added to another's.
        fresh_fields: size and modules → what PEFT's config says of a fresh expert; None where none can be made.
        usual_places: what that config also says in an architecture that PEFT does not know.
        misfit: why a tensor set has no place in a base, empty if it has; a missing module raises AttributeError.
    """

    formula: str
    paper: str
    peft_type: str
    parse: Callable[[AdapterHeader], Parts]
    key_of_parameter: Callable[[str], str]
    has_update: bool = False
    stores_factors: bool = False
    reads_base: bool = False
    init_slots: tuple[str, ...] = ()
    meaning_fields: tuple[str, ...] = ()
    before_text: bool = False
    embeds_tokens: bool = False
    needs_import: bool = False
    why_no_update: str = ""
    fresh_fields: Callable[[int | None, Sequence[str] | None], dict[str, Any]] | None = None
    usual_places: Callable[[nn.Module], dict[str, Any]] = _no_places
    misfit: Callable[[TensorSet, nn.Module, Mapping[str, Any]], str] = _anywhere

    @property
    def prefix(self) -> str:
        """The prefix that PEFT's model adds to the names of the base's parameters."""
        return PROMPT_PREFIX if self.before_text else PREFIX


KINDS = Family("pimerge.adapters.kinds", "kind", "KIND", Kind)
