"""Updates of bare parameters (PEFT's ``target_parameters``), such as the stacked weights of a mixture of experts.

PEFT adapts a parameter of shape (E, …) with one LoRA of rank r for each of its E matrices, and stores them together:
A is (E·r × d_in), with the rows of one matrix side by side; B is (d_out × r·E), and its column j belongs to matrix
j mod E (``ParamWrapper.get_delta_weight``). Versions of Unsloth before 2026.9.6 store B with the columns of one matrix
side by side instead: column j belongs to matrix j // r.

Several adapted parameters of one module are nested: the last one in the module's code has the keys
``module.lora_A.weight``, the one before it ``module.base_layer.lora_A.weight``, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import BareParameter, Factors, LoraModule, bias_key, stored
from pimerge.adapters.merged_module import MergedModule
from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option

if TYPE_CHECKING:
    from torch import Tensor


class ExpertOrder(StrEnum):
    """How the columns of B are stored: PEFT's order, by rank, or that of older versions of Unsloth, by expert."""

    RANK = "rank"
    EXPERT = "expert"


ORDER_FIELD = "lora_B_layout"
"""The field of adapter_config.json in which Unsloth states how the columns of B are stored."""
ORDERS = {"rank_major": ExpertOrder.RANK, "grouped_by_expert": ExpertOrder.EXPERT}
"""The values of this field."""
EXPERT_ORDER = Option(
    "expert_order",
    ExpertOrder,
    "How adapters of a mixture's stacked weights store the updates of its experts, where adapter_config.json does not "
    "say: by rank, as PEFT does, or by expert, as Unsloth did before 2026.9.6.",
)

# Parameters of modules of transformers in the order of their code; no module has them in another order.
_ORDER = (
    "gate_proj",
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "w1",
    "v1",
    "down_proj",
    "down_proj_bias",
    "w2",
)


@dataclass(frozen=True)
class SlicedModule(LoraModule):
    """The update of one matrix of a stacked parameter; its factors are slices of the tensors A and B.

    Attributes:
        by_expert: whether the columns of B that belong to one matrix are stored side by side, as Unsloth did.
    """

    is_plain: ClassVar[bool] = False
    by_expert: bool = False

    def factors(self, read: Callable[[str], Tensor]) -> Factors:
        """Read its factors in the common layout; ``read`` reads the tensor of a key."""
        assert self.parameter is not None
        index, count, rank = self.parameter.index, self.parameter.count, self.rank
        own = slice(index * rank, (index + 1) * rank)
        return Factors(
            read(self.A)[own], read(self.B)[:, own if self.by_expert else slice(index, None, count)], self.scaling
        )


def with_order(config: Mapping[str, Any], order: str | None) -> dict[str, Any]:
    """A config that states how the columns of B are stored, if it did not.

    Args:
        order: an :class:`ExpertOrder`, or None for a config that stays as it is.

    >>> with_order({}, "expert"), with_order({"lora_B_layout": "rank_major"}, "expert")
    ({'lora_B_layout': 'grouped_by_expert'}, {'lora_B_layout': 'rank_major'})
    """
    if order is not None and (problem := EXPERT_ORDER.problem(order)):
        raise PimergeError(problem)
    values = {meant.value: value for value, meant in ORDERS.items()}
    return dict(config) if order is None else {ORDER_FIELD: values[order], **config}


def is_order_unknown(config: Mapping[str, Any]) -> bool:
    """Whether a version of Unsloth wrote a config that does not say how the columns of B are stored.

    >>> is_order_unknown({"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}), is_order_unknown({})
    (True, False)
    """
    mapping = config.get("auto_mapping")
    is_unsloth = isinstance(mapping, dict) and mapping.get("unsloth_fixed")
    base = str(config.get("base_model_name_or_path"))
    return config.get(ORDER_FIELD) is None and bool(is_unsloth or base.lower().startswith("unsloth/"))


def nesting(names: Iterable[str]) -> list[str] | None:
    """The parameters of a module from the innermost to the outermost of PEFT's layers; None if the order is unknown.

    >>> nesting(["down_proj", "gate_up_proj"]), nesting(["a"]), nesting(["a", "b"])
    (['gate_up_proj', 'down_proj'], ['a'], None)
    """
    found = sorted(names)
    if len(found) > 1 and not set(found) <= set(_ORDER):
        return None
    return sorted(found, key=_ORDER.index) if len(found) > 1 else found


def packed(slices: Mapping[int, Factors], count: int) -> tuple[Tensor, Tensor]:
    """A (count·r × d_in) and B (d_out × r·count) of a stacked parameter, as PEFT stores them, for scaling 1.

    The rank r is the highest of the slices. A lower rank is filled up with zeros, and a matrix without an update is
    zero, so every ΔW stays the same.

    >>> import torch
    >>> A, B = packed({1: Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0)}, count=2)
    >>> A.tolist(), B.tolist()
    ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    """
    first = next(iter(slices.values()))
    rank = max(len(factors.A) for factors in slices.values())
    A = first.A.new_zeros(count, rank, first.A.shape[1])
    B = first.B.new_zeros(len(first.B), rank, count)
    for index, factors in slices.items():
        own = len(factors.A)
        A[index, :own] = factors.A
        B[:, :own, index] = factors.B if factors.scaling == 1 else factors.B.double() * factors.scaling
    return A.view(count * rank, -1), B.view(len(first.B), rank * count)


class Packing:
    """Gathers merged modules until the tensors in which PEFT stores them are complete."""

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self._places = _places(modules)
        self._missing: dict[str, int] = {}
        self._slices: dict[str, dict[int, Factors]] = {}
        plain = [module for module in modules if module.parameter is None]
        for module in modules:
            if module.parameter is not None:
                self._missing[module.parameter.full_name] = self._missing.get(module.parameter.full_name, 0) + 1
        self.keys = [key for module in plain for key in (module.A, module.B, bias_key(module.name))]
        self.keys += [f"{place}.lora_{letter}.weight" for place in self._places.values() for letter in "AB"]

    def add(self, merged: MergedModule) -> dict[str, Tensor]:
        """The tensors that a module completes."""
        parameter = merged.module.parameter
        if parameter is None:
            return stored(merged.module, merged.factors)
        name = parameter.full_name
        self._slices.setdefault(name, {})[parameter.index] = merged.factors
        self._missing[name] -= 1
        if self._missing[name]:
            return {}
        A, B = packed(self._slices.pop(name), parameter.count)
        return {f"{self._places[name]}.lora_A.weight": A, f"{self._places[name]}.lora_B.weight": B}


def is_by_expert(modules: Iterable[LoraModule]) -> bool:
    """Whether some of the modules are stored in the order of Unsloth, which PEFT does not read."""
    return any(isinstance(module, SlicedModule) and module.by_expert for module in modules)


def target_ranks(modules: Sequence[LoraModule], ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of each module, and of each bare parameter by its full name: the highest of its matrices.

    Args:
        ranks: name of a module → its rank.
    """
    found: dict[str, int] = {}
    for module in modules:
        name = module.name if module.parameter is None else module.parameter.full_name
        found[name] = max(ranks[module.name], found.get(name, 0))
    return found


def bare_names(modules: Iterable[LoraModule]) -> frozenset[str]:
    """The full names of the bare parameters among some modules."""
    return frozenset(module.parameter.full_name for module in modules if module.parameter)


def _places(modules: Sequence[LoraModule]) -> dict[str, str]:
    """Full name of each bare parameter → the key of PEFT's layer for it."""
    found: dict[str, dict[str, BareParameter]] = {}
    for module in modules:
        if module.parameter is not None:
            found.setdefault(module.parameter.module, {})[module.parameter.name] = module.parameter
    places = {}
    for owner, own in found.items():
        names = nesting(own)
        assert names is not None, "experts with parameters of an unknown order are refused"
        for depth, name in enumerate(reversed(names)):
            places[own[name].full_name] = PREFIX + owner + ".base_layer" * depth
    return places
