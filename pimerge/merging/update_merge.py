"""Merge updates ΔW module by module, without loading the base; each module is computed on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from pimerge.adapters.compatibility import require_finite
from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_fields import is_fused
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.low_rank import (
    EVERYTHING,
    Truncated,
    Truncation,
    inner_products,
    orthonormal_basis,
    to_cores,
    truncated,
    truncated_dense,
    weighted_bias,
    weighted_sum,
)
from pimerge.adapters.merged_module import MergedModule
from pimerge.adapters.rounding import rounded, shared_scaling
from pimerge.adapters.token_modules import rows_have, token_axis
from pimerge.checkpoints.dtypes import as_read
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.core.errors import PimergeError
from pimerge.merging.method import OpenedMethod, Space
from pimerge.merging.request import EntrySpace
from pimerge.merging.token_rows import TokenRows

F64 = torch.float64


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of a merge of updates, apart from the method and the weights.

    Attributes:
        truncation: truncation of the result's rank.
        space: entries that an elementwise method works on.
        dtype: dtype of the result; None keeps the dtype of the experts, or the widest if they differ.
        fisher: returns the diagonal Fisher of an expert's tensor by key, for methods that need it.
        gram: returns the input Gram of a module on an expert's data, for methods that need it.
        read: reads the factors of an expert's module.
    """

    truncation: Truncation = EVERYTHING
    space: EntrySpace = EntrySpace.CORE
    dtype: torch.dtype | None = None
    fisher: Callable[[Expert, str], Tensor] | None = None
    gram: Callable[[Expert, str], Tensor | None] | None = None
    read: Callable[[Expert, str], Factors] = Expert.factors


@dataclass(frozen=True, kw_only=True)
class UpdateMerge(UpdateSettings):
    """A checked merge of updates ΔW; see :func:`pimerge.merging.preparation.prepare`.

    Attributes:
        experts: the experts to merge; equal ones are joined.
        weights: module → one weight per expert, for the modules to merge.
        dtype: dtype of the result.
        joined: name of an expert → how often it was given, for experts that were given more than once.
    """

    experts: Sequence[Expert]
    weights: Mapping[str, Sequence[float]]
    method: OpenedMethod
    dtype: torch.dtype
    joined: Mapping[str, int]

    @cached_property
    def has_bias(self) -> bool:
        """Whether any module has a bias update; PEFT then expects one in each module."""
        return any(
            expert.modules[name].bias for expert in self.experts for name in expert.modules.keys() & self.weights
        )

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of the computation: float32, or float64 for a result in float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def _stored(self, name: str) -> torch.dtype:
        """The dtype that decides whether the config carries a scaling; not for modules that PEFT gives a common one."""
        return self._wide if is_fused(name) or self.layout(name).parameter else self.dtype

    @property
    def by_factor(self) -> bool:
        """Whether A and B are merged separately."""
        return self.method.space is Space.FACTORS or self.space is EntrySpace.FACTORS

    @property
    def names(self) -> list[str]:
        """The modules, in alphabetical order."""
        return list(self.weights)

    def layout(self, name: str) -> LoraModule:
        """The layout of a module, from the first expert that has it whole; as a bare parameter if any has it so."""
        found = [expert.modules[name] for expert in self.experts if name in expert.modules]
        largest = max(found, key=lambda module: module.d_out * module.d_in)  # some vocabularies may have more tokens
        return next((module for module in found if module.parameter), largest)

    def module(self, name: str) -> MergedModule:
        """Merge one module; refuse NaN and Inf in an expert, and a result that is too large for its dtype."""
        is_light = self.by_factor or (self.method.space is Space.LINEAR and self.truncation == EVERYTHING)
        with _one_thread() if is_light else nullcontext():
            return self._module(name)

    def _module(self, name: str) -> MergedModule:
        layout, weights = self.layout(name), torch.tensor(self.weights[name], dtype=F64)
        parts = [self._part(expert, name, layout) for expert in self.experts]
        rows = self._by_tokens(layout, parts)
        whole = parts if rows is None else rows.common
        coefficients = None
        if self.method.space is Space.LINEAR:
            coefficients = self.method.coefficients(weights, lambda: inner_products(whole))
        summed = (weights if coefficients is None else coefficients).tolist()
        if rows is None:
            found = self._merged(name, layout, parts, weights, coefficients)
        else:
            inner = replace(self, truncation=EVERYTHING, dtype=F64)
            common = inner._merged(name, layout, whole, weights, coefficients).factors
            common = replace(common, bias=weighted_bias(whole, summed, F64, common.scaling) if self.has_bias else None)
            parts = [rows.placed(common, 0), *rows.rest(summed)]
            summed = [1.0] * len(parts)
            limit = Truncation(min(layout.d_out, layout.d_in)) if self.truncation == EVERYTHING else self.truncation
            found = weighted_sum(parts, summed, limit, self._stored(name))
        narrow = rounded(found.factors, self.dtype)
        bias = weighted_bias(parts, summed, self.dtype, narrow.factors.scaling) if self.has_bias else None
        factors = replace(narrow.factors, bias=bias)
        if not all(tensor is None or is_finite(tensor) for tensor in (factors.A, factors.B, factors.bias)):
            raise _too_large(name, self.dtype)
        given = None if coefficients is None else tuple(coefficients.tolist())
        energy, rounding = found.energy or narrow.energy, found.rounding + narrow.error
        return MergedModule(layout, factors, energy, found.lost, given, rounding)

    def _by_tokens(self, layout: LoraModule, parts: Sequence[Factors]) -> TokenRows | None:
        """The updates of a module by tokens, if the experts have vocabularies of several sizes."""
        axis = token_axis(layout)
        if axis is None:
            return None
        most = layout.d_in if axis == 1 else layout.d_out
        sizes = [min(rows_have(expert, layout) or most, most) for expert in self.experts]
        return TokenRows(parts, sizes, axis) if len(set(sizes)) > 1 else None

    def _part(self, expert: Expert, name: str, layout: LoraModule) -> Factors:
        """Read the update of an expert, which is zero and of rank 0 if it does not adapt the module."""
        if name not in expert.modules:
            return Factors(torch.zeros(0, layout.d_in), torch.zeros(layout.d_out, 0), 1.0)
        part = self.read(expert, name)
        if not all(tensor is None or is_finite(tensor) for tensor in (part.A, part.B, part.bias)):
            require_finite(self.experts)  # names every such tensor of every expert
            raise PimergeError(f"the update of '{expert.name}' in module '{name}' contains NaN or Inf")
        return part

    def _merged(
        self, name: str, layout: LoraModule, parts: Sequence[Factors], weights: Tensor, coefficients: Tensor | None
    ) -> Truncated:
        limit = min(layout.d_out, layout.d_in)
        if coefficients is not None:
            return weighted_sum(parts, coefficients.tolist(), self.truncation, self._stored(name))
        match self.method.space:
            case Space.INPUTS:
                turned = self._transformed(name, parts, weights)
                return weighted_sum(turned, [1.0] * len(turned), self.truncation, self._stored(name))
            case Space.FACTORS:
                return self._by_factor(name, parts, weights, limit)
            case Space.ROWS:
                return self._by_rows(parts, weights, limit)
            case Space.ELEMENTWISE if self.space is EntrySpace.FACTORS:
                return self._by_factor(name, parts, weights, limit)
            case Space.ELEMENTWISE if self.space is EntrySpace.DELTA:
                deltas = torch.stack([part.scaling * part.B.to(self._wide) @ part.A.to(self._wide) for part in parts])
                return truncated_dense(self._apply(name, deltas, weights, limit), self.truncation)
            case Space.ELEMENTWISE:
                cores = to_cores(parts).canonical()
            case Space.REFERENCE:
                cores = to_cores(parts).reference()
            case _:
                cores = to_cores(parts)
        stacked = cores.stacked(self._wide) if self.method.space is Space.ELEMENTWISE else cores.stacked()
        merged = self._apply(name, stacked, weights, limit)
        return truncated(merged, cores, self.truncation)

    def _apply(self, name: str, deltas: Tensor, weights: Tensor, limit: int) -> Tensor:
        drawn = self.experts if "generators" in self.method.needs else []
        draws = [f"{expert.file.beginning} {name}" for expert in drawn]
        merged = self.method.merge(deltas, weights.to(deltas.dtype), draws=draws, limit=limit)
        if not is_finite(merged):
            raise _too_large(name, merged.dtype)
        return merged

    def _by_rows(self, parts: Sequence[Factors], weights: Tensor, limit: int) -> Truncated:
        U, left = orthonormal_basis([part.scaling * part.B.to(F64) for part in parts])
        rows = torch.stack([own @ part.A.to(F64) for own, part in zip(left, parts, strict=True)])
        within = truncated_dense(self.method.merge(rows, weights, limit=limit), self.truncation)
        return replace(within, factors=Factors(within.factors.A, U.times(within.factors.B), 1.0))

    def _by_factor(self, name: str, parts: Sequence[Factors], weights: Tensor, limit: int) -> Truncated:
        """Merge A and B separately, which requires that the experts share an init."""
        stacks = {
            "A": torch.stack([part.A.to(self._wide) for part in parts]),
            "B": torch.stack([part.scaling * part.B.to(self._wide) for part in parts]),
        }
        shared = shared_scaling([part.scaling for part in parts], self._stored(name))
        merged = {}
        for letter, stack in stacks.items():
            if self.method.space is Space.FACTORS:
                fishers = self._fishers(name, letter, parts)
                merged[letter] = self.method.merge(stack, weights.to(self._wide), fishers=fishers)
            else:
                merged[letter] = self._apply(f"{name} {letter}", stack, weights, limit)
        if self.truncation == EVERYTHING:
            return Truncated(Factors(merged["A"], merged["B"] / shared, shared), 0.0, 0.0)
        cores = to_cores([Factors(merged["A"], merged["B"], 1.0)])
        return truncated(cores.stacked()[0], cores, self.truncation)

    def _fishers(self, name: str, letter: str, parts: Sequence[Factors]) -> Tensor:
        """Return the diagonal Fisher of one factor; B includes the scaling s here, so its Fisher is divided by s².

        The Fisher was measured at strength 1, so s excludes the strength.
        """
        assert self.fisher is not None
        found = []
        for expert, part in zip(self.experts, parts, strict=True):
            key = getattr(expert.modules[name], letter)
            diagonal = self.fisher(expert, key).to(self._wide).reshape(part.A.shape if letter == "A" else part.B.shape)
            scaling = part.scaling / expert.strength if expert.strength else 1.0
            found.append(diagonal / scaling**2 if letter == "B" and scaling else diagonal)
        return torch.stack(found)

    def _transformed(self, name: str, parts: Sequence[Factors], weights: Tensor) -> list[Factors]:
        """Return factors whose A is transformed by the input Grams; the plain sum for modules without Grams."""
        assert self.gram is not None
        known = [self.gram(expert, name) for expert in self.experts]
        present = [gram for gram in known if gram is not None]
        if not present:
            return [Factors(part.A, part.B * w, part.scaling) for part, w in zip(parts, weights.tolist(), strict=True)]
        mean = sum(present, torch.zeros(())) / len(present)
        rows = self.method.transformed(
            [part.A.to(F64) for part in parts], weights, [mean if gram is None else gram for gram in known]
        )
        return [Factors(row, part.B, part.scaling) for row, part in zip(rows, parts, strict=True)]


def widest(dtypes: Iterable[Iterable[str]]) -> torch.dtype:
    """Return the dtype that represents the numbers of all experts, given the safetensors dtypes of each.

    >>> widest([("F16",), ("BF16", "F16")])
    torch.float32
    """
    return reduce(torch.promote_types, (as_read(dtype) for each in dtypes for dtype in each))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: without linear algebra, a module is too little work for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _too_large(name: str, dtype: torch.dtype) -> PimergeError:
    wider = "float64" if dtype == torch.float32 else "float32"
    return PimergeError(
        f"the merged update of module '{name}' is too large for {dtype}", f"pass --dtype {wider}, or smaller weights"
    )
