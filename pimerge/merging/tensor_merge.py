"""Merge experts without ΔW, whose tensors are combined number by number, one tensor set after the other.

A linear method gives each tensor set one coefficient per expert: the projections of a bottleneck share it, and so do
the keys and values of a prefix's layer. An elementwise method sees φ_n − φ0 of one tensor after the other, around the
kind's neutral point φ0 (0 where it has none). ``fisher`` sees the numbers themselves. Methods that need singular
vectors or a layer's inputs need ΔW and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.additive_tensors import F64, BaseTensor, at_strength, neutral, weighted
from pimerge.adapters.compatibility import require_finite
from pimerge.adapters.expert import Expert
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot, joined, read_slot
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.checkpoints.key_mapping import Names, match, names_of
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.core.errors import PimergeError
from pimerge.merging.method import OpenedMethod, Space
from pimerge.merging.update_merge import widest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMerge:
    """A merge that has been checked; see :func:`prepare_tensors`.

    Attributes:
        experts: of one form.
        weights: tensor set → one weight per expert; all 0 for one that stays neutral.
        dtype: of the result; None for that of each tensor, the widest of the experts'.
        base: reads the base's parameters.
        coefficients: tensor set → what each expert was multiplied by, for linear methods; filled by :meth:`tensors`.
    """

    experts: Sequence[Expert]
    weights: Mapping[str, Sequence[float]]
    method: OpenedMethod
    dtype: torch.dtype | None
    base: BaseTensor
    fisher: Callable[[Expert, str], Tensor] | None
    coefficients: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tensor_sets(self) -> Mapping[str, TensorSet]:
        """Those of every expert."""
        return self.experts[0].tensor_sets

    def tensors(self) -> dict[str, Tensor]:
        """Key → merged tensor."""
        found: dict[tuple[str, str], Tensor] = {}
        for name, tensor_set in self.tensor_sets.items():
            parts = {slot: self._parts(name, slot) for slot in tensor_set.slots}
            coefficients = self._linear(name, tensor_set, parts)
            for slot, each in parts.items():
                found[name, slot] = self._merged(name, slot, each, coefficients)
        merged = joined(self.tensor_sets, found)
        rounded = {key: tensor.to(self._dtype_of(key)) for key, tensor in merged.items()}
        for key, tensor in rounded.items():
            if not is_finite(tensor):
                raise PimergeError(
                    f"'{key}' is too large for {tensor.dtype}", "pass --dtype float32, or smaller weights"
                )
        return rounded

    def _slot(self, name: str, slot: str) -> TensorSlot:
        return self.tensor_sets[name].slots[slot]

    def _zero(self, name: str, slot: str) -> Tensor:
        return neutral(self._slot(name, slot), self.base)

    def _parts(self, name: str, slot: str) -> list[Tensor]:
        return [at_strength(expert, expert.tensor_sets[name].slots[slot], self.base) for expert in self.experts]

    def _linear(self, name: str, tensor_set: TensorSet, parts: Mapping[str, Sequence[Tensor]]) -> list[float] | None:
        """The coefficients of a linear method; inner products are those of φ_n − φ0 over the whole tensor set."""
        if self.method.space is not Space.LINEAR:
            return None

        def inner() -> Tensor:
            flat = torch.stack(
                [
                    torch.cat([(parts[slot][index] - self._zero(name, slot)).flatten() for slot in tensor_set.slots])
                    for index in range(len(self.experts))
                ]
            )
            return flat @ flat.T

        weights = torch.tensor(self.weights[name], dtype=F64)
        found = self.method.coefficients(weights, inner) if weights.any() else weights
        self.coefficients[name] = found.tolist()
        return self.coefficients[name]

    def _merged(self, name: str, slot: str, parts: Sequence[Tensor], coefficients: Sequence[float] | None) -> Tensor:
        weights = self.weights[name]
        if coefficients is not None:
            return weighted(parts, coefficients, lambda: self._zero(name, slot))
        if not any(weights):
            return self._zero(name, slot)
        tensor = torch.tensor(weights, dtype=F64)
        if self.method.space is Space.FACTORS:
            return self.method.merge(torch.stack(list(parts)), tensor, fishers=self._fishers(name, slot))
        zero = self._zero(name, slot)
        deltas = torch.stack([part - zero for part in parts])
        draws = [f"{expert.file.beginning} {name} {slot}" for expert in self.experts]
        return zero + self.method.merge(deltas, tensor, draws=draws, limit=min(zero.shape))

    def _fishers(self, name: str, slot: str) -> Tensor:
        read = self.fisher
        assert read is not None
        own = self._slot(name, slot)
        return torch.stack([read_slot(own, partial(read, expert)).to(F64) for expert in self.experts])

    def _dtype_of(self, key: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return widest([expert.file.entries[key].dtype] for expert in self.experts)


def prepare_tensors(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]],
    method: OpenedMethod,
    *,
    dtype: torch.dtype | None = None,
    selected: Callable[[str], bool] = lambda name: True,
    fisher: Callable[[Expert, str], Tensor] | None = None,
) -> TensorMerge:
    """Check a merge of experts without ΔW that fit each other.

    Args:
        weights: tensor set → one per expert.
        dtype: of the result; None for the experts' own.
        selected: which tensor sets to merge; the others stay neutral.
        fisher: the diagonal Fisher of an expert's tensor by key, for ``fisher``.
    """
    require_finite(experts)
    first = experts[0]
    if not method.space.takes_any_tensor:
        what = "a layer's inputs" if method.space is Space.INPUTS else "the singular vectors of ΔW"
        raise PimergeError(
            f"'{method.name}' works on {what}, and experts of kind {first.kind} have no ΔW",
            "use a linear method such as uniform or interpolated, fisher, or an elementwise one such as ties",
        )
    left_out = [name for name in first.tensor_sets if not selected(name)]
    if left_out and not first.has_strength:
        raise PimergeError(
            f"'{left_out[0]}' cannot be left out: nothing stands for a {first.kind} that leaves the base unchanged",
            "leave out --include and --exclude",
        )
    if len(left_out) == len(first.tensor_sets):
        raise PimergeError(
            "no module is left to merge", f"they are named like '{left_out[0]}'; look at --include and --exclude"
        )
    chosen = {name: [0.0] * len(experts) if name in left_out else weights[name] for name in first.tensor_sets}
    return TensorMerge(experts, chosen, method, dtype, base_reader(first.base), fisher)


def base_reader(base: Base) -> BaseTensor:
    """A reader of a base's parameters by their names in the task's model; opened when the first one is asked for."""

    @cache
    def opened() -> tuple[Checkpoint, Names]:
        if base.folder is None:
            raise PimergeError(
                f"the base '{base.name}' is not on this machine, and this merge needs its values",
                "download it first (hf download NAME), pass --base with its folder, or take weights that sum to 1",
            )
        checkpoint = open_checkpoint(base.folder)
        return checkpoint, names_of(checkpoint)

    def read(name: str) -> Tensor:
        checkpoint, names = opened()
        return checkpoint.read(match(names, name, f"'{name}'"))

    return read
