"""Merge experts without ΔW entry by entry, one tensor set after the other.

A linear method computes one coefficient per expert and tensor set, so the projections of a bottleneck share one, and
so do the keys and values of a prefix layer. An elementwise method gets φ_n − φ0 of one tensor after the other, where φ0
is the neutral value of the kind (0 if it has none). A method that works on parameters gets φ_n. Methods that need
singular vectors or a layer's inputs need ΔW and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from pimerge.adapters.additive_tensors import F64, BaseTensor, at_strength, neutral, weighted
from pimerge.adapters.compatibility import require_finite
from pimerge.adapters.expert import Expert
from pimerge.adapters.tensor_sets import TensorSet, joined, read_slot
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.checkpoints.key_mapping import Names, match, names_of
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, OpenedMethod, Space
from pimerge.merging.update_merge import widest


@dataclass(frozen=True)
class TensorMerge:
    """A checked merge of experts without ΔW; see :func:`prepare_tensors`.

    Attributes:
        experts: experts with the same tensor sets.
        weights: tensor set → one weight per expert; all 0 for a tensor set that stays neutral.
        dtype: dtype of the result; None stands for the widest dtype of the experts, tensor by tensor.
        base: reads the parameters of the base.
        coefficients: tensor set → one coefficient per expert, for linear methods; filled by :meth:`tensors`.
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
        """The tensor sets, which all experts share."""
        return self.experts[0].tensor_sets

    def tensors(self) -> dict[str, Tensor]:
        """Compute the merged tensors by key."""
        found: dict[tuple[str, str], Tensor] = {}
        for name, tensor_set in self.tensor_sets.items():
            parts = {
                slot: [at_strength(expert, expert.tensor_sets[name].slots[slot], self.base) for expert in self.experts]
                for slot in tensor_set.slots
            }
            coefficients = self._linear(name, parts)
            for slot, each in parts.items():
                found[name, slot] = self._merged(name, slot, each, coefficients)
        merged = joined(self.tensor_sets, found)
        rounded = {
            key: tensor.to(
                self.dtype or widest([e.file.entries[key].dtype] for e in self.experts if key in e.file.entries)
            )
            for key, tensor in merged.items()
        }
        for key, tensor in rounded.items():
            if not is_finite(tensor):
                raise PimergeError(
                    f"'{key}' is too large for {tensor.dtype}", "pass --dtype float32, or smaller weights"
                )
        return rounded

    def _zero(self, name: str, slot: str) -> Tensor:
        return neutral(self.tensor_sets[name].slots[slot], self.base)

    def _linear(self, name: str, parts: Mapping[str, Sequence[Tensor]]) -> list[float] | None:
        """Return the coefficients of a linear method, whose inner products are of φ_n − φ0 over the tensor set."""
        if self.method.space is not Space.LINEAR:
            return None

        def inner() -> Tensor:
            deltas = [torch.stack(list(each)) - self._zero(name, slot) for slot, each in parts.items()]
            flat = torch.cat([delta.flatten(1) for delta in deltas], dim=1)
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
        assert self.fisher is not None
        own = self.tensor_sets[name].slots[slot]
        if lacking := [e.name for e in self.experts if not e.tensor_sets[name].slots[slot].is_stored]:
            raise PimergeError(
                f"'{lacking[0]}' does not adapt '{name}', so it has no Fisher information of it",
                f"use a linear method, or leave the module out: --exclude '{name}'",
            )
        return torch.stack([read_slot(own, partial(self.fisher, expert)).to(F64) for expert in self.experts])


def prepare_tensors(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]],
    method: OpenedMethod,
    *,
    dtype: torch.dtype | None = None,
    selected: Callable[[str], bool] = lambda name: True,
    fisher: Callable[[Expert, str], Tensor] | None = None,
) -> TensorMerge:
    """Check a merge of compatible experts without ΔW.

    Args:
        weights: tensor set → one weight per expert.
        dtype: dtype of the result; None keeps the dtype of the experts.
        selected: tells by name which tensor sets to merge; the others stay neutral.
        fisher: returns the diagonal Fisher of an expert's tensor by key, for methods that need it.
    """
    require_finite(experts)
    first = experts[0]
    if not method.space.takes_any_tensor:
        what = "a layer's inputs" if method.space is Space.INPUTS else "the singular vectors of ΔW"
        raise PimergeError(
            f"'{method.name}' needs {what}, and experts of kind {first.kind} have no ΔW",
            "these methods merge them: " + ", ".join(other.name for other in METHODS if other.space.takes_any_tensor),
        )
    left_out = [name for name in first.tensor_sets if not selected(name)]
    if left_out and not first.has_strength:
        raise PimergeError(
            f"'{left_out[0]}' cannot be left out: kind {first.kind} has no value that leaves the model unchanged",
            "leave out --include and --exclude",
        )
    if len(left_out) == len(first.tensor_sets):
        raise PimergeError(
            "no module is left to merge", f"they are named like '{left_out[0]}'; look at --include and --exclude"
        )
    chosen = {name: [0.0] * len(experts) if name in left_out else weights[name] for name in first.tensor_sets}
    return TensorMerge(experts, chosen, method, dtype, base_reader(first.base), fisher)


def base_reader(base: Base) -> BaseTensor:
    """Return a reader of the base's parameters by their names in the task's model; it opens the base when used."""

    @cache
    def opened() -> tuple[Checkpoint, Names]:
        if base.folder is None:
            raise PimergeError(
                f"this merge needs values of the base '{base.name}', which is not on this machine",
                "download it first (hf download NAME), pass --base with its folder, or use weights that sum to 1",
            )
        checkpoint = open_checkpoint(base.folder)
        return checkpoint, names_of(checkpoint)

    def read(name: str) -> Tensor:
        checkpoint, names = opened()
        key = match(names, name, f"'{name}'")
        return checkpoint.read((names.shared or {}).get(key, key))

    return read
