"""Experts of tensors that are combined number by number: their layout, and what their kinds' parsers share.

A strength s of such an expert means neutral + s · (φ − neutral), with the neutral point that of an expert that changes
nothing; where a kind has none, only strength 1 means anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kinds._keys import PREFIX, CommonFields, faulty_fields, sort_keys
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a group.

    Attributes:
        key: in the adapter's file.
        shape: of the tensor, or of its part.
        neutral: the value at which it changes nothing; None if ``base`` says it, or if it has none.
        base: the base's parameter that it takes the place of, whose values are its neutral point.
        columns: the part of the stored tensor that belongs to the group; None for all of it.
    """

    key: str
    shape: tuple[int, ...]
    neutral: float | None = None
    base: str | None = None
    columns: tuple[int, int] | None = None

    @property
    def has_neutral(self) -> bool:
        """Whether a strength moves it."""
        return self.neutral is not None or self.base is not None


@dataclass(frozen=True)
class TensorSet:
    """Tensors that share one weight when experts are combined.

    Attributes:
        name: the adapted module's full name in the base; of a prefix the layer's.
        slots: slot → tensor, in alphabetical order.
    """

    name: str
    slots: Mapping[str, TensorSlot]

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return sum(math.prod(slot.shape) for slot in self.slots.values())

    @property
    def form(self) -> tuple[object, ...]:
        """What two groups must share to be combined."""
        return tuple((name, slot.shape) for name, slot in self.slots.items())


def read_slot(slot: TensorSlot, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of a slot; ``read`` gives that of a key."""
    tensor = read(slot.key)
    return tensor if slot.columns is None else tensor[:, slot.columns[0] : slot.columns[1]]


def joined(groups: Mapping[str, TensorSet], tensors: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Key → tensor as it is stored, from (group, slot) → tensor: the inverse of :func:`read_slot`."""
    import torch

    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, group in groups.items():
        for slot_name, slot in group.slots.items():
            start = slot.columns[0] if slot.columns else 0
            parts.setdefault(slot.key, []).append((start, tensors[name, slot_name]))
    return {
        key: torch.cat([part for _, part in sorted(found, key=lambda each: each[0])], 1).contiguous()
        if len(found) > 1
        else found[0][1].contiguous()
        for key, found in parts.items()
    }


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """What PEFT's config says of a fresh expert of a kind that has no size; see :mod:`pimerge.adapters.kinds`.

    Raises:
        PimergeError: if a size is asked for.

    >>> fresh_fields(None, ["q_proj"])
    {'target_modules': ['q_proj']}
    """
    if size is not None:
        raise PimergeError(
            f"--fresh-rank is {size}, and this kind of expert has no size",
            "leave it out: it is the rank of a LoRA, or the size of a bottleneck, a prefix or a prompt",
        )
    return {"target_modules": list(modules)} if modules else {}


def parse_tensor_sets(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    pattern: re.Pattern[str],
    what: str,
    slot: Callable[[str, str, str, tuple[int, ...]], TensorSlot | str],
    needed: frozenset[str],
    *,
    fields: type[CommonFields] = CommonFields,
) -> tuple[dict[str, TensorSet], dict[str, str]]:
    """The groups of an expert, one for each module, and its head.

    Args:
        pattern: of a key behind PEFT's prefix, with ``module`` and ``slot``.
        what: the kind's tensors, for messages.
        slot: (module, slot, key, shape) → the slot, or what is wrong with its shape.
        needed: the slots that every module has.
        fields: of the config that are read.

    Raises:
        PimergeError: with all that is wrong, by name.
    """

    def slot_of(key: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        return (match["module"], match["slot"]) if match else None

    problems = Problems()
    faulty = faulty_fields(fields, config, problems)
    config = {field: value for field, value in config.items() if field not in faulty}
    keys, head = sort_keys(config, shapes, slot_of, what, problems)
    groups = {}
    for module in sorted(keys):
        found = {name: slot(module, name, key, shapes[key]) for name, key in sorted(keys[module].items())}
        for name, each in found.items():
            if isinstance(each, str):
                problems.add(f"module '{module}': {name} is {shapes[keys[module][name]]}, {each}", "save it again")
        if missing := needed - found.keys():
            problems.add(f"module '{module}' has no {' and '.join(sorted(missing))}", "save the adapter again")
        groups[module] = TensorSet(module, {name: each for name, each in found.items() if isinstance(each, TensorSlot)})
    problems.raise_any(f"these {what} cannot be used")
    return groups, head
