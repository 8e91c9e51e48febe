"""Modules whose ΔW is computed from tensors of another form than LoRA's, and its factors.

Whatever merges, compares or tunes LoRA serves these modules as well, and the result is a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]
_OVERSAMPLING = 8


@dataclass(frozen=True)
class ComputedModule(LoraModule):
    """One module whose ΔW is computed; A and B are the keys that its factors have in a merged LoRA.

    Attributes:
        rank: of the factors: the most that ΔW's can be.
        slots: slot → key of a tensor in the file.
        shapes: slot → its shape.
        shared: keys of trained tensors that it shares with other modules.
        dense: reads the tensors and gives ΔW (d_out × d_in) in float64; also takes the base's weight, if it is needed.
    """

    slots: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    dense: Callable[[Read, Tensor | None], Tensor] | None = None

    @property
    def is_computed(self) -> bool:
        """True: its factors are not in the file."""
        return True

    @property
    def full_rank(self) -> int:
        """The most that ΔW's rank can be."""
        return self.rank

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its own tensors."""
        return self.slots

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the trained tensors that make its ΔW."""
        return (*self.slots.values(), *self.shared)

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """The keys of trained tensors that it shares with other modules."""
        return self.shared

    @property
    def numbers(self) -> int:
        """How many its own tensors hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def form(self) -> tuple[object, ...]:
        """The properties that two modules must share to be compared parameter by parameter."""
        return tuple(self.shapes.items())

    def factors(self, read: Read, weight: Tensor | None = None) -> Factors:
        """Its ΔW in the common layout, computed from what ``read`` gives of each key.

        Args:
            weight: the base's weight (d_out × d_in), for a kind whose ΔW depends on it.
        """
        assert self.dense is not None
        return Factors(*factorised(self.dense(read, weight), self.rank), self.scaling)


def factorised(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank × d_in) and B (d_out × rank) with B A = ΔW, for a ΔW that has at most that rank.

    From the smaller side of ΔW on, one of them is the identity. Below, B is an orthonormal basis of ΔW Ω with a random
    Ω (Halko et al. 2011, arXiv 0909.4061), which is exact for such a ΔW, and far cheaper than its SVD.

    >>> import torch
    >>> delta = torch.outer(torch.arange(3.0), torch.arange(4.0)).double()
    >>> A, B = factorised(delta, 1)
    >>> tuple(A.shape), tuple(B.shape), torch.allclose(B @ A, delta)
    ((1, 4), (3, 1), True)
    """
    import torch

    d_out, d_in = delta.shape
    if rank >= min(d_out, d_in):
        one = torch.eye(min(d_out, d_in), dtype=delta.dtype)
        return (delta, one) if d_out <= d_in else (one, delta)
    columns = min(d_in, rank + _OVERSAMPLING)
    random = torch.randn(d_in, columns, generator=torch.Generator().manual_seed(0), dtype=delta.dtype)
    basis, _ = torch.linalg.qr(delta @ random)
    left, _, _ = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    B = basis @ left[:, :rank]
    return B.T @ delta, B


def as_tensor_sets(modules: Mapping[str, LoraModule]) -> dict[str, TensorSet]:
    """The stored tensors, one set for each module, as a fresh expert of the kind trains them."""
    return {
        name: TensorSet(name, {slot: TensorSlot(key, module.shapes[slot]) for slot, key in module.slots.items()})
        for name, module in modules.items()
        if isinstance(module, ComputedModule)
    }
