"""Merge experts module by module, each when it is asked for, without loading the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.compatibility import require_alike, require_finite, require_shared_form
from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.low_rank import (
    EVERYTHING,
    MergedModule,
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
from pimerge.checkpoints.safetensors_file import is_finite, torch_dtype
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.method import OpenedMethod, Space

if TYPE_CHECKING:
    from torch import Tensor

SPACES = ("core", "delta", "factors")
F64 = torch.float64


@dataclass(frozen=True)
class Merge:
    """A merge that has been checked; see :func:`prepare`.

    Attributes:
        experts: those that are merged; equal ones are joined.
        weights: module → one weight per expert, for the modules that are merged.
        space: of an elementwise method: ``core``, ``delta`` or ``factors``.
        dtype: of the result.
        joined: expert's name → how often it was given, where that is more than once.
    """

    experts: Sequence[Expert]
    weights: Mapping[str, Sequence[float]]
    method: OpenedMethod
    space: str
    truncation: Truncation
    dtype: torch.dtype
    joined: Mapping[str, int]
    fisher: Callable[[Expert, str], Tensor] | None
    gram: Callable[[Expert, str], Tensor | None] | None
    read: Callable[[Expert, str], Factors] = field(default=Expert.factors)

    @cached_property
    def has_bias(self) -> bool:
        """Whether any module has a bias update; PEFT then expects one of each."""
        return any(
            expert.modules[name].bias for expert in self.experts for name in expert.modules.keys() & self.weights
        )

    @property
    def _wide(self) -> torch.dtype:
        """What entries are computed in: float32, or float64 for a result in float64."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def names(self) -> list[str]:
        """The modules, in alphabetical order."""
        return list(self.weights)

    def layout(self, name: str) -> LoraModule:
        """The layout of a module, from the first expert that has it."""
        return next(expert.modules[name] for expert in self.experts if name in expert.modules)

    def module(self, name: str) -> MergedModule:
        """Merge one module.

        Raises:
            PimergeError: for NaN or Inf in an expert, and if the result is too large for its dtype.
        """
        is_light = "factors" in (self.space, self.method.space) or (
            self.method.space is Space.LINEAR and self.truncation == EVERYTHING
        )
        with _one_thread() if is_light else nullcontext():
            return self._module(name)

    def _module(self, name: str) -> MergedModule:
        layout, weights = self.layout(name), torch.tensor(self.weights[name], dtype=F64)
        parts = [self._part(expert, name, layout) for expert in self.experts]
        coefficients = self._coefficients(parts, weights)
        found = self._merged(name, layout, parts, weights, coefficients)
        summed = (weights if coefficients is None else coefficients).tolist()
        bias = weighted_bias(parts, summed, self.dtype) if self.has_bias else None
        factors = Factors(found.factors.A.to(self.dtype), found.factors.B.to(self.dtype), 1.0, bias)
        if not all(tensor is None or is_finite(tensor) for tensor in (factors.A, factors.B, factors.bias)):
            raise _too_large(name, self.dtype)
        given = None if coefficients is None else tuple(coefficients.tolist())
        return MergedModule(layout, factors, found.energy, found.lost, given)

    def _part(self, expert: Expert, name: str, layout: LoraModule) -> Factors:
        """An expert's update; zero, of rank 0, where it has none: the weights stay as they are."""
        if name not in expert.modules:
            return Factors(torch.zeros(0, layout.d_in), torch.zeros(layout.d_out, 0), 1.0)
        part = self.read(expert, name)
        if not all(tensor is None or is_finite(tensor) for tensor in (part.A, part.B, part.bias)):
            require_finite(self.experts)  # names every such tensor of every expert
            raise PimergeError(f"module '{name}' of '{expert.name}': its update is NaN or Inf")
        return part

    def _coefficients(self, parts: Sequence[Factors], weights: Tensor) -> Tensor | None:
        if self.method.space is not Space.LINEAR:
            return None
        return self.method.coefficients(weights, lambda: inner_products(parts))

    def _merged(
        self, name: str, layout: LoraModule, parts: Sequence[Factors], weights: Tensor, coefficients: Tensor | None
    ) -> Truncated:
        limit = min(layout.d_out, layout.d_in)
        if coefficients is not None:
            return weighted_sum(parts, coefficients.tolist(), self.truncation, self.dtype)
        match self.method.space:
            case Space.INPUTS:
                turned = self._transformed(name, parts, weights)
                return weighted_sum(turned, [1.0] * len(turned), self.truncation, self.dtype)
            case Space.FACTORS:
                return self._by_factor(name, parts, weights, limit)
            case Space.ROWS:
                return self._by_rows(parts, weights, limit)
            case Space.ELEMENTWISE if self.space == "factors":
                return self._by_factor(name, parts, weights, limit)
            case Space.ELEMENTWISE if self.space == "delta":
                deltas = torch.stack([part.scaling * part.B.to(self._wide) @ part.A.to(self._wide) for part in parts])
                return truncated_dense(self._apply(name, deltas, weights, limit), self.truncation)
            case Space.ELEMENTWISE:
                cores = to_cores(parts).canonical()
                merged = self._apply(name, cores.stacked(self._wide), weights, limit)
            case Space.REFERENCE:
                cores = to_cores(parts).reference()
                merged = self._apply(name, cores.stacked(), weights, limit)
            case _:
                cores = to_cores(parts)
                merged = self._apply(name, cores.stacked(), weights, limit)
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
        """Parameter by parameter; the experts share an init, so that their entries mean the same."""
        stacks = {
            "A": torch.stack([part.A.to(self._wide) for part in parts]),
            "B": torch.stack([part.scaling * part.B.to(self._wide) for part in parts]),
        }
        merged = {}
        for letter, stack in stacks.items():
            if self.method.space is Space.FACTORS:
                fishers = self._fishers(name, letter, parts)
                merged[letter] = self.method.merge(stack, weights.to(self._wide), fishers=fishers)
            else:
                merged[letter] = self._apply(f"{name} {letter}", stack, weights, limit)
        if self.truncation == EVERYTHING:
            return Truncated(Factors(merged["A"], merged["B"], 1.0), 0.0, 0.0)
        cores = to_cores([Factors(merged["A"], merged["B"], 1.0)])
        return truncated(cores.stacked()[0], cores, self.truncation)

    def _fishers(self, name: str, letter: str, parts: Sequence[Factors]) -> Tensor:
        """The diagonal Fisher of one factor; B carries the scaling here, so its Fisher is that of s·B.

        It was measured at the expert's full strength, so its ``scale`` is no part of s: a weaker update says no more.
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
        """The factors with the rows of A turned by the inputs' statistics; embeddings and others: the plain sum."""
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without linear algebra a module is so little work that handing it to threads takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: OpenedMethod,
    *,
    truncation: Truncation = EVERYTHING,
    space: str = "core",
    dtype: torch.dtype | None = None,
    selected: Callable[[str], bool] = lambda name: True,
    fisher: Callable[[Expert, str], Tensor] | None = None,
    gram: Callable[[Expert, str], Tensor | None] | None = None,
    read: Callable[[Expert, str], Factors] = Expert.factors,
) -> Merge:
    """Check a merge of experts; its modules are then computed one by one by :meth:`Merge.module`.

    An expert that does not adapt a module contributes a zero update there; the weights stay as they are. Equal
    experts are joined and their weights added.

    Args:
        weights: one per expert, or module → one per expert.
        truncation: of the result's rank.
        space: where an elementwise method looks at entries: ``core``, ``delta`` or ``factors``.
        dtype: of the result; None for the experts' own, the wider if they differ.
        selected: which modules to merge; the others are left out of the result.
        fisher: the diagonal Fisher of an expert's tensor by key, for ``fisher``.
        gram: the Gram matrix of a module's inputs on an expert's data, for ``regmean``.
        read: gives the factors of an expert's module; by default as they are stored.

    Raises:
        PimergeError: if the experts do not fit each other, the weights do not match, or nothing is left.
    """
    if space not in SPACES:
        raise PimergeError(f"--space is '{space}'", f"expected {', '.join(SPACES)}")
    if space != "core" and method.space is not Space.ELEMENTWISE:
        raise PimergeError(f"--space is for elementwise methods, and '{method.name}' is not", "leave it out")
    require_alike(experts)
    found = sorted({name for expert in experts for name in expert.modules})
    names = [name for name in found if selected(name)]
    if not names:
        raise PimergeError(
            "no module is left to merge", f"the experts have {len(found)}, such as '{found[0]}'; look at --include"
        )
    by_module = _weights_by_module(found, weights, len(experts))
    kept, totals, joined = _joined(experts, {name: by_module[name] for name in names})
    if method.space is Space.FACTORS or space == "factors":
        require_shared_form(kept)
    return Merge(kept, totals, method, space, truncation, dtype or _widest(experts), joined, fisher, gram, read)


def _too_large(name: str, dtype: torch.dtype) -> PimergeError:
    wider = "float64" if dtype == torch.float32 else "float32"
    return PimergeError(
        f"module '{name}': the merged update is too large for {dtype}", f"pass --dtype {wider}, or smaller weights"
    )


def _joined(
    experts: Sequence[Expert], weights: Mapping[str, Sequence[float]]
) -> tuple[list[Expert], dict[str, list[float]], dict[str, int]]:
    """Equal experts as one, with their weights added."""
    first: dict[tuple[object, ...], int] = {}
    places = [first.setdefault(_identity(expert, experts), len(first)) for expert in experts]
    kept = [experts[places.index(place)] for place in range(len(first))]
    totals = {}
    for name, values in weights.items():
        totals[name] = [0.0] * len(kept)
        for place, value in zip(places, values, strict=True):
            totals[name][place] += value
    return kept, totals, {kept[p].name: places.count(p) for p in range(len(kept)) if places.count(p) > 1}


def _identity(expert: Expert, experts: Sequence[Expert]) -> tuple[object, ...]:
    """What equal experts share; the whole file is hashed only if another has the same beginning."""
    begins = [other for other in experts if other.file.beginning == expert.file.beginning]
    scalings = tuple(module.scaling for module in expert.modules.values())
    meaning = tuple(expert.config.get(field) for field in expert.strategy.meaning_fields)
    return expert.file.beginning, expert.kind, meaning, scalings, expert.sha256 if len(begins) > 1 else ""


def _weights_by_module(
    names: Sequence[str], weights: Mapping[str, Sequence[float]] | Sequence[float], count: int
) -> dict[str, Sequence[float]]:
    by_module = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(names, weights)
    problems = Problems()
    unknown = sorted(set(by_module) - set(names))
    if unknown:
        problems.add(f"weights for {len(unknown)} modules that no expert has, such as '{unknown[0]}'")
    missing = [name for name in names if name not in by_module]
    if missing:
        problems.add(f"no weights for {len(missing)} modules, such as '{missing[0]}'", "they belong to other experts")
    for name, values in by_module.items():
        if len(values) != count or not all(torch.isfinite(torch.tensor(value)) for value in values):
            problems.add(f"{len(values)} weights ({', '.join(map(str, values))}) for {count} experts in '{name}'")
            break
    problems.raise_any("the weights do not match the experts")
    return by_module


def _widest(experts: Sequence[Expert]) -> torch.dtype:
    dtypes = [torch_dtype(dtype) for expert in experts for dtype in expert.dtypes]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
