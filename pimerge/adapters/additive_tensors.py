"""Weighted sums of experts whose tensors are combined elementwise, around their neutral point.

    φ̂ = φ0 + Σ_n w_n s_n (φ_n − φ0)

with φ0 the expert that changes nothing, w_n the weights and s_n the strengths. φ0 drops out if the weights sum to 1 at
strength 1; the base's values, from which φ0 may be taken, are then not read. A tensor without a neutral point has
φ0 = 0 and strength 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.expert import Expert
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot, joined, read_slot
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor

F64 = torch.float64
BaseTensor = Callable[[str], "Tensor"]
_ONE = 1e-9


def neutral(slot: TensorSlot, base: BaseTensor) -> Tensor:
    """The slot's values in an expert that changes nothing, in float64; zeros if there is no such expert."""
    if slot.base is None:
        return torch.full(slot.shape, slot.neutral or 0.0, dtype=F64)
    whole = base(slot.base)
    if slot.rows and max(slot.rows) >= len(whole):
        raise PimergeError(
            f"the base's '{slot.base}' has {len(whole)} rows, but an expert trains the row of token {max(slot.rows)}",
            "the expert was trained on a base with added tokens: pass it with --base",
        )
    found = (whole[list(slot.rows)] if slot.rows else whole).to(F64).cpu()
    if tuple(found.shape) != slot.shape:
        raise PimergeError(
            f"the base's '{slot.base}' is {tuple(found.shape)}, but the expert's is {slot.shape}",
            "the expert was trained on another base: pass its own with --base",
        )
    return found


def at_strength(expert: Expert, slot: TensorSlot, base: BaseTensor) -> Tensor:
    """A slot's tensor at the expert's strength, in float64."""
    if not slot.is_stored:
        return neutral(slot, base)
    values = read_slot(slot, expert.tensor).to(F64)
    if slot.stored_rows:
        stored, values = values, neutral(slot, base)
        values[[slot.rows.index(row) for row in slot.stored_rows]] = stored
    if expert.strength == 1 or not slot.has_neutral:
        return values
    zero = neutral(slot, base)
    return zero + expert.strength * (values - zero)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float], zero: Callable[[], Tensor]) -> Tensor:
    """φ0 + Σ w_n (φ_n − φ0), in float64; ``zero`` gives φ0 and is called only if it is needed.

    >>> two = [torch.tensor([3.0], dtype=F64), torch.tensor([5.0], dtype=F64)]
    >>> weighted(two, [0.5, 1.0], lambda: torch.ones(1, dtype=F64)).item()
    6.0
    """
    total = sum((w * tensor for w, tensor in zip(weights, tensors, strict=True)), torch.zeros((), dtype=F64))
    rest = 1 - sum(weights)
    return total if abs(rest) < _ONE else total + rest * zero()


def sum_of(experts: Sequence[Expert], weights: Sequence[float], base: BaseTensor) -> dict[str, Tensor]:
    """The weighted sum of experts of one form: key → tensor, in float64."""
    sets: dict[str, TensorSet] = experts[0].tensor_sets
    found = {}
    for name, tensor_set in sets.items():
        for slot_name, slot in tensor_set.slots.items():
            parts = [at_strength(expert, expert.tensor_sets[name].slots[slot_name], base) for expert in experts]
            found[name, slot_name] = weighted(parts, weights, lambda slot=slot: neutral(slot, base))  # type: ignore[misc]
    return joined(sets, found)
