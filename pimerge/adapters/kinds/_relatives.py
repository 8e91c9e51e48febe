"""LoRA's relatives: kinds whose ΔW follows from their tensors by a formula of their own.

A module's tensors become factors, ΔW = s·B·A in float64, when they are read: so whatever merges, compares or tunes LoRA
serves these kinds, too, and the result is a LoRA. Where the formula gives more rows than ΔW has a rank for, one of the
factors is ΔW itself and the other the identity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PREFIX, sort_keys
from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor, nn

Read = Callable[[str], "Tensor"]
Build = Callable[[Read], "tuple[Tensor, Tensor]"]
Layers = Callable[[Sequence[str]], Mapping[str, tuple[int, ...]]]
"""Names of modules → shapes of the base's weights, (d_out, d_in, *kernel)."""

CONVOLUTION = "it adapts a convolution, whose shape only the base knows, and the base is not there or has no such layer"
BASE_HINT = "pass --base with the folder of the base that it was trained on"

# Fields that say where the tensors sit or how they were trained.
_HARMLESS = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules modules_to_save layers_to_transform layers_pattern bias init_weights runtime_config""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Relative(LoraModule):
    """One module of a relative; A and B are the keys that its factors have in a merged LoRA.

    Attributes:
        rank: of the factors: the most that ΔW's can be.
        slots: slot → key of a tensor in the file.
        shapes: slot → its shape.
        build: reads them and gives A and B in float64, without the scaling.
    """

    slots: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    build: Build | None = None

    @property
    def is_computed(self) -> bool:
        """True: its factors are not in the file."""
        return True

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its tensors that are trained."""
        return self.slots

    @property
    def numbers(self) -> int:
        """How many these hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def form(self) -> tuple[object, ...]:
        """What two modules must share to be compared number by number."""
        return tuple(self.shapes.items())

    def factors(self, read: Read) -> Factors:
        """Its ΔW in the common layout, computed from what ``read`` gives of each key."""
        import torch

        assert self.build is not None
        A, B = self.build(read)
        if len(A) > self.rank:  # no ΔW of this shape has such a rank
            delta = B @ A
            one = torch.eye(self.rank, dtype=delta.dtype)
            A, B = (delta, one) if self.d_out <= self.d_in else (one, delta)
        return Factors(A, B, self.scaling)


def relative(
    name: str,
    weight: tuple[int, ...],
    rank: int,
    alpha: float,
    scaling: float,
    slots: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    build: Build,
) -> Relative:
    """The module of a relative.

    Args:
        weight: shape of the base's weight, (d_out, d_in, *kernel).
        rank: how many rows ``build`` gives A.
        shapes: of the tensors, by key.
    """
    d_out, *inputs = weight
    rank = min(rank, d_out, math.prod(inputs))
    kernel = inputs[1:]
    return Relative(
        name,
        f"{PREFIX}{name}.lora_A.weight",
        f"{PREFIX}{name}.lora_B.weight",
        None,
        rank,
        alpha,
        scaling,
        "conv" if kernel else "linear",
        (rank, *inputs),
        (d_out, rank, *(1 for _ in kernel)),
        slots=slots,
        shapes={slot: shapes[key] for slot, key in slots.items()},
        build=build,
    )


def checked_config(
    fields: type[CommonFields], config: Mapping[str, Any], problems: Problems, known: Collection[str] = ()
) -> dict[str, Any]:
    """The config with every field that is read, of the right type; whatever is not understood is a problem.

    Args:
        fields: those that the kind reads.
        known: others that do not change what the tensors mean.
    """
    faulty = faulty_fields(fields, config, problems)
    right = {name: value for name, value in config.items() if name not in faulty}
    if (right.get("bias") or "none") != "none":
        problems.add(
            f"bias is '{right['bias']}': trained biases of the base are no update that can be added",
            "train with bias='none'",
        )
    for name in sorted(set(right) - set(fields.model_fields) - _HARMLESS - set(known)):
        if right[name]:
            problems.add(
                f"'{name}' in adapter_config.json is not known to this version of pimerge",
                "if the field does not change what the tensors mean, set it to null",
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in right.get(name) or {}:
            try:
                re.compile(key)
            except re.error as error:
                problems.add(f"{name} in adapter_config.json: '{key}' is no regular expression ({error})")
                right = right | {name: {}}
    defaults = {name: each.default for name, each in fields.model_fields.items()}
    return defaults | {name: value for name, value in right.items() if value is not None}


def keys_by_module(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    slots: Collection[str],
    what: str,
    problems: Problems,
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module → slot → key, in alphabetical order, and the head's keys; every other key is a problem."""

    def slot_of(key: str) -> tuple[str, str] | None:
        module, _, slot = key.removeprefix(PREFIX).rpartition(".")
        return (module, slot) if module and slot in slots and key.startswith(PREFIX) else None

    keys, head = sort_keys(config, shapes, slot_of, what, problems)
    return {name: dict(sorted(keys[name].items())) for name in sorted(keys)}, head


class PatternFields(CommonFields):
    """What LoHa and LoKr read of a config."""

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


def parse_modules(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    layers: Layers,
    slots: Collection[str],
    known: Collection[str],
    what: str,
    module: Callable[..., Relative],
) -> tuple[dict[str, Relative], dict[str, str]]:
    """The modules of a kind whose tensors tell the shape of a layer, but for a convolution's, and the head.

    A base that is not on this machine is needed for convolutions alone: without it a layer counts as Linear.

    Args:
        slots: all that a module can have.
        known: fields of the config that do not change what the tensors mean.
        what: the kind's name.
        module: name, slot → key, shapes, config and the base's shape, or None → the module.

    Raises:
        PimergeError: with all that it cannot handle.
    """
    problems = Problems()
    config = checked_config(PatternFields, config, problems, known)
    keys, head = keys_by_module(config, shapes, slots, f"{what} factors", problems)
    weights: Mapping[str, tuple[int, ...]] = {}
    with suppress(PimergeError):
        weights = layers(list(keys))
    found = {}
    for name, own in keys.items():
        with problems.collected(f"module '{name}': "):
            found[name] = module(name, own, shapes, config, weights.get(name))
    problems.raise_any(f"this {what} cannot be used")
    return found, head


def require_slots(slots: Collection[str], wanted: Collection[str]) -> None:
    """Check which tensors one module has.

    Raises:
        PimergeError: with those that are missing, or too many.
    """
    if missing := sorted(set(wanted) - set(slots)):
        raise PimergeError(f"it has no {' and '.join(missing)}", "save the adapter again")
    if extra := sorted(set(slots) - set(wanted)):
        raise PimergeError(f"it has {' and '.join(extra)}, too", "save the adapter again")


def require_shapes(
    slots: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the tensors of one module.

    Args:
        wanted: slot → shape, of every tensor.

    Raises:
        PimergeError: if one is missing or has another shape.
    """
    require_slots(slots, wanted)
    different = [
        f"{slot} is {shapes[slots[slot]]}, expected {shape}"
        for slot, shape in sorted(wanted.items())
        if shapes[slots[slot]] != shape
    ]
    if different:
        raise PimergeError(
            ", ".join(different), "adapter_config.json belongs to another adapter, or the expert to another base"
        )


def as_tensor_sets(modules: Mapping[str, LoraModule]) -> dict[str, TensorSet]:
    """The tensors themselves, one group for each module: what a fresh expert of the kind trains."""
    return {
        name: TensorSet(name, {slot: TensorSlot(key, module.shapes[slot]) for slot, key in module.slots.items()})
        for name, module in modules.items()
        if isinstance(module, Relative)
    }


def fresh_fields(size: int | None, modules: Sequence[str] | None, name: str = "r") -> dict[str, Any]:
    """What PEFT's config says of a fresh expert.

    Args:
        name: of the field that holds the size.

    >>> fresh_fields(4, ["q"])
    {'init_weights': True, 'r': 4, 'target_modules': ['q']}
    """
    sizes = {name: size} if size is not None else {}
    return {"init_weights": True, **sizes, **({"target_modules": list(modules)} if modules else {})}


def usual_places(model: nn.Module) -> dict[str, Any]:
    """What PEFT's config says of a fresh expert that is told no modules: those of a LoRA."""
    from pimerge.checkpoints.architecture import lora_targets  # imports torch, which reading a file needs not

    return {"target_modules": lora_targets(model)}


def key_of_parameter(name: str) -> str:
    """The adapter file's key for the name of a parameter of PEFT's model with adapter ``default``.

    >>> key_of_parameter("base_model.model.q.hada_w1_a.default")
    'base_model.model.q.hada_w1_a'
    """
    return name.removesuffix(".default")


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a group has no place in a base; empty if it has."""
    model.get_submodule(group.name)  # PEFT made its tensors for this very layer
    return ""
