"""Modules whose ΔW is computed from tensors in another format than LoRA's, and then factorised.

All code that merges, compares or tunes LoRA works with these modules as well; the result is a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]
_OVERSAMPLING = 8


@dataclass(frozen=True)
class ComputedModule(LoraModule):
    """A module whose ΔW is computed; A and B are the keys of its factors in a merged LoRA.

    Attributes:
        rank: upper bound of ΔW's rank, which its factors have.
        slots: slot → key of a tensor in the file.
        shapes: slot → shape of the tensor.
        shared: keys of trained tensors that several modules share.
        dense: computes ΔW (d_out × d_in) in float64 from a reader of tensors and, if needed, the base's weight.
    """

    is_computed: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False
    slots: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    dense: Callable[[Read, Tensor | None], Tensor] | None = None

    @property
    def full_rank(self) -> int:
        """Upper bound of ΔW's rank."""
        return self.rank

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its own tensors."""
        return self.slots

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the trained tensors that determine ΔW."""
        return (*self.slots.values(), *self.shared, *([self.bias] if self.bias else []))

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """The keys of trained tensors that several modules share."""
        return self.shared

    @property
    def numbers(self) -> int:
        """The number of entries of its own tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def form(self) -> tuple[object, ...]:
        """Names and shapes, which two modules must share to be compared entry by entry."""
        return tuple(self.shapes.items())

    def factors(self, read: Read, weight: Tensor | None = None) -> Factors:
        """Compute its ΔW as factors in the common layout.

        Args:
            read: reads the tensor of a key.
            weight: the base's weight (d_out × d_in), for a kind whose ΔW depends on it.
        """
        assert self.dense is not None
        return Factors(*factorised(self.dense(read, weight), self.rank), self.scaling, self.read_bias(read))


def factorised(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorise a ΔW of at most a given rank: A (rank × d_in) and B (d_out × rank) with B A = ΔW.

    If the rank is at least the smaller side of ΔW, one factor is the identity. Otherwise B is an orthonormal basis of
    ΔW Ω with a random Ω (Halko et al. 2011, arXiv 0909.4061), which is exact for such a ΔW and far cheaper than an SVD.

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
    """The tensors of computed modules as sets, one for each module, as a fresh expert of the kind trains them."""
    return {
        name: TensorSet(name, {slot: TensorSlot(key, module.shapes[slot]) for slot, key in module.slots.items()})
        for name, module in modules.items()
        if isinstance(module, ComputedModule)
    }
