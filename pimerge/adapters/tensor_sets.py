"""Experts of tensors that are combined number by number: their layout.

A strength s of such an expert means neutral + s · (φ − neutral), with the neutral point that of an expert that changes
nothing; where a kind has none, only strength 1 means anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        """The properties that two tensor sets must share to be combined."""
        return tuple((name, slot.shape) for name, slot in self.slots.items())


def read_slot(slot: TensorSlot, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of a slot; ``read`` gives that of a key."""
    tensor = read(slot.key)
    return tensor if slot.columns is None else tensor[:, slot.columns[0] : slot.columns[1]]


def joined(groups: Mapping[str, TensorSet], tensors: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Key → tensor as stored, from (tensor set, slot) → tensor: the inverse of :func:`read_slot`."""
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
