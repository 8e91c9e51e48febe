"""The layout of experts whose tensors are combined elementwise.

Such an expert at strength s is neutral + s · (φ − neutral), with the neutral point of an expert that changes nothing. A
kind without a neutral point has only strength 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a set.

    Attributes:
        key: its key in the adapter's file.
        shape: shape of the tensor or, with ``columns``, of its part.
        neutral: the value at which it changes nothing; None if ``base`` gives it or there is none.
        base: the base's parameter that it replaces, whose values are its neutral point.
        columns: the part of the stored tensor that belongs to the set; None for the whole tensor.
        rows: the rows of ``base`` that it replaces; empty for all.
        stored_rows: those of them that the file holds, if it does not hold all; the others are the base's.
        is_stored: whether the file holds it; otherwise the expert leaves the module as it is.
    """

    key: str
    shape: tuple[int, ...]
    neutral: float | None = None
    base: str | None = None
    columns: tuple[int, int] | None = None
    rows: tuple[int, ...] = ()
    stored_rows: tuple[int, ...] = ()
    is_stored: bool = True

    @property
    def has_neutral(self) -> bool:
        """Whether it has a neutral point, so that strengths other than 1 are defined."""
        return self.neutral is not None or self.base is not None


@dataclass(frozen=True)
class TensorSet:
    """Tensors that share one weight when experts are combined.

    Attributes:
        name: full name of the adapted module in the base; for a prefix, of the layer.
        slots: slot → tensor, in alphabetical order.
    """

    name: str
    slots: Mapping[str, TensorSlot]

    @property
    def numbers(self) -> int:
        """The number of entries of all its tensors."""
        return sum(math.prod(slot.shape) for slot in self.slots.values())

    @property
    def has_rows(self) -> bool:
        """Whether it replaces some rows only."""
        return any(slot.rows for slot in self.slots.values())

    @property
    def form(self) -> tuple[object, ...]:
        """Names, shapes and rows, which two sets must share to be combined."""
        return tuple((name, slot.shape, slot.rows) for name, slot in self.slots.items())


class Effect(StrEnum):
    """What a tensor does to a parameter of the base."""

    REPLACED = "replaced"
    SCALED_OUTPUTS = "scaled outputs"
    SCALED_INPUTS = "scaled inputs"
    ROWS_REPLACED = "rows replaced"


@dataclass(frozen=True)
class BaseChange:
    """The change of one parameter of the base by an expert without ΔW.

    Attributes:
        parameter: its name in the base.
        key: key of the adapter's tensor.
        shape: shape of the adapter's tensor.
        is_optional: whether the layer may lack the parameter.
        rows: the rows that are replaced, if only some are.
    """

    parameter: str
    key: str
    shape: tuple[int, ...]
    effect: Effect = Effect.REPLACED
    is_optional: bool = False
    rows: tuple[int, ...] = ()


def replacements(tensor_set: TensorSet) -> list[BaseChange]:
    """The parameters of the base that a set's tensors replace."""
    slots = tensor_set.slots.values()
    return [BaseChange(slot.base, slot.key, slot.shape) for slot in slots if slot.base is not None]


def read_slot(slot: TensorSlot, read: Callable[[str], Tensor]) -> Tensor:
    """Read the tensor of a slot; ``read`` reads the tensor of a key."""
    tensor = read(slot.key)
    return tensor if slot.columns is None else tensor[:, slot.columns[0] : slot.columns[1]]


def joined(sets: Mapping[str, TensorSet], tensors: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Join the tensors of slots as they are stored, key → tensor: the inverse of :func:`read_slot`.

    Args:
        tensors: (set, slot) → tensor.
    """
    import torch

    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor_set in sets.items():
        for slot_name, slot in tensor_set.slots.items():
            start = slot.columns[0] if slot.columns else 0
            parts.setdefault(slot.key, []).append((start, tensors[name, slot_name]))
    ordered = {key: [part for _, part in sorted(found, key=lambda each: each[0])] for key, found in parts.items()}
    return {key: (torch.cat(each, 1) if len(each) > 1 else each[0]).contiguous() for key, each in ordered.items()}
