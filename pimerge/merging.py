"""Align experts and merge them module by module in ΔW space, without loading the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pimerge.compatibility import require_alike, require_finite
from pimerge.errors import PimergeError, Problems
from pimerge.expert import Expert
from pimerge.lowrank import MergedModule, MergeFunction, merge_module

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def merge(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: MergeFunction,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[MergedModule]:
    """Merge experts, module by module, in alphabetical order.

    An expert that does not adapt a module contributes a zero update there; the weights stay as they are.

    Args:
        weights: one per expert, or module → one per expert.
        method: ``merge`` of a merge method.
        rank: of the result; None keeps every direction.
        dtype: of the result; None for the experts' own, the wider if they differ.

    Raises:
        PimergeError: if the experts do not fit each other, hold NaN or Inf, or the weights do not match.
    """
    if rank is not None and rank < 1:
        raise PimergeError(f"--rank is {rank}, expected at least 1, or max")
    require_alike(experts)
    require_finite(experts)
    names = sorted({name for expert in experts for name in expert.modules})
    by_module = _weights_by_module(names, weights, len(experts))
    kept = dtype or _widest(experts)
    merged = []
    for name in names:
        parts = [expert.factors(name) if name in expert.modules else None for expert in experts]
        layout = next(expert.modules[name] for expert in experts if name in expert.modules)
        merged.append(merge_module(layout, parts, by_module[name], method, rank=rank, dtype=kept))
    _require_in_range(merged, kept)
    return merged


def _require_in_range(merged: Sequence[MergedModule], dtype: torch.dtype) -> None:
    """What was finite and summed in float64 may be too large for the result's dtype."""
    problems = Problems()
    for module in merged:
        tensors = (module.factors.A, module.factors.B, module.factors.bias)
        if not all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors):
            problems.add(
                f"module '{module.module.name}': the merged update is too large for {dtype}",
                "pass --dtype float32, or smaller weights",
            )
    problems.raise_any("the merged updates are too large")


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
    dtypes = [DTYPES[dtype] for expert in experts for dtype in expert.dtypes]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
