"""Merge full checkpoints tensor by tensor: W = W0 + merge(W_n − W0).

Linear methods compute W = (1 − Σc_n) W0 + Σ c_n W_n in float64 and in pieces, so a single expert at weight 1 comes
back bit by bit, and memory does not grow with the tensors. Other methods read whole tensors, in float32 (float64 for
F64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.checkpoints.writer import flat_pieces, write_like
from pimerge.core.errors import Problems
from pimerge.core.progress import Track, silent
from pimerge.merging.checkpoint_plan import CheckpointPlan
from pimerge.merging.method import OpenedMethod, Space

Weights = Mapping[str, Sequence[float]] | Sequence[float]


@dataclass(frozen=True)
class MergedTensors:
    """Statistics of a merged checkpoint that was written.

    Attributes:
        merged: number of merged tensors.
        kept: number of unchanged tensors of the base.
        dropped: keys of the heads that were left out.
        size: total size of the tensors in bytes.
    """

    merged: int
    kept: int
    dropped: tuple[str, ...]
    size: int


class _Finite:
    """Collects the tensors that contain NaN or Inf."""

    def __init__(self) -> None:
        self.bad: dict[tuple[str, str], None] = {}

    def check(self, checkpoint: Checkpoint, key: str, values: Tensor) -> None:
        if not is_finite(values):
            self.bad[checkpoint.name, key] = None

    def raise_any(self) -> None:
        problems = Problems()
        for name, key in self.bad:
            problems.add(f"'{key}' of '{name}' contains NaN or Inf", "its training diverged: leave the checkpoint out")
        problems.raise_any("NaN or Inf weights")


def merge_checkpoints(
    plan: CheckpointPlan,
    weights: Weights,
    method: OpenedMethod,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> MergedTensors:
    """Write the merged checkpoint, with the shards, key names and order of the base.

    Args:
        plan: the result of :func:`pimerge.merging.checkpoint_plan.plan_checkpoints`.
        weights: one weight per expert, for all tensors or by key of the base.
        output: an empty folder, or a file path if the base is a single file.
        dtype: dtype of the floating-point tensors; None keeps the dtypes of the base.
    """
    finite = _Finite()

    def change(key: str) -> Iterator[Tensor] | None:
        if key in plan.heads:
            return _head(plan, key, finite)
        if key not in plan.merged:
            return None
        given = torch.tensor(list(weights[key] if isinstance(weights, Mapping) else weights), dtype=torch.float64)
        if method.space is Space.LINEAR:
            return _linear(plan, key, given, method, finite)
        return iter([_whole(plan, key, given, method, finite)])

    new = {}
    for key, parts in plan.heads.items():
        number, source = next(iter(parts.items()))
        kind = plan.base.entry(key).dtype if key in plan.base.home else plan.experts[number].entry(source).dtype
        new[key] = (kind, plan.experts[number].entry(source).shape)
    size = write_like(plan.base, output, change, new=new, config=plan.config, dtype=dtype, track=track)
    finite.raise_any()
    kept = len(plan.base.home.keys() - plan.merged.keys() - plan.heads.keys())
    return MergedTensors(len(plan.merged), kept, plan.dropped, size)


def _linear(plan: CheckpointPlan, key: str, weights: Tensor, method: OpenedMethod, finite: _Finite) -> Iterator[Tensor]:
    """Yield (1 − Σc_n) W0 + Σ c_n W_n, piece by piece; a piece that all experts share with the base is copied."""

    def gram() -> Tensor:
        total = torch.zeros(len(weights), len(weights), dtype=torch.float64)
        for base, experts in _pieces(plan, key):
            deltas = torch.stack([expert.double() - base.double() for expert in experts])
            total += deltas @ deltas.T
        return total

    found = method.coefficients(weights, gram).tolist()
    rest = 1 - math.fsum(found)
    for base, experts in _pieces(plan, key):
        values = [base.double(), *(expert.double() for expert in experts)]
        if all(torch.equal(values[0], value) for value in values[1:]):
            yield base
            continue
        _check(plan, key, values, finite)
        terms = [(c, value) for c, value in zip([rest, *found], values, strict=True) if c != 0]
        total = terms[0][1] * terms[0][0] if terms else torch.zeros_like(values[0])
        for c, value in terms[1:]:
            total.add_(value, alpha=c)
        yield total


def _pieces(plan: CheckpointPlan, key: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield flat pieces of a tensor: the numbers of the base, and those of each expert."""
    count = math.prod(plan.base.entry(key).shape)
    sources = [(plan.base, key), *zip(plan.experts, plan.merged[key], strict=True)]
    step = 2**18  # 2 MiB of float64 for each checkpoint: the sums stay in cache
    for start in range(0, count, step):
        stop = min(start + step, count)
        base, *experts = (found.home[name].read_part(name, start, stop) for found, name in sources)
        yield base, experts


def _whole(plan: CheckpointPlan, key: str, weights: Tensor, method: OpenedMethod, finite: _Finite) -> Tensor:
    """Merge a whole tensor: its deltas, or its parameters if the method works on parameters."""
    kind = torch.float64 if plan.base.entry(key).dtype == "F64" else torch.float32
    base = plan.base.read(key).to(kind)
    names = plan.merged[key]
    stacked = torch.empty(len(names), *base.shape, dtype=kind)
    for row, expert, name in zip(stacked, plan.experts, names, strict=True):
        row.copy_(expert.read(name))
    if all(torch.equal(base, row) for row in stacked):
        return base.view(-1)
    _check(plan, key, [base, *stacked], finite)
    if method.space is Space.FACTORS:
        fishers = [file.read(name).to(kind) for file, name in zip(plan.fishers, names, strict=False)]
        given = {"fishers": torch.stack(fishers)} if fishers else {}
        merged: Tensor = method.merge(stacked, weights.to(kind), draws=(), limit=0, **given)
        return merged.reshape(-1)
    stacked -= base
    draws = []
    if "generators" in method.needs:
        draws = [f"{expert.sha256} {key}" for expert in plan.experts]
    rows = base.shape[0] if base.dim() else 1
    limit = min(rows, base.numel() // max(1, rows))
    return base.add_(method.merge(stacked, weights.to(kind), draws=draws, limit=limit)).view(-1)


def _check(plan: CheckpointPlan, key: str, values: Sequence[Tensor], finite: _Finite) -> None:
    finite.check(plan.base, key, values[0])
    for expert, name, value in zip(plan.experts, plan.merged[key], values[1:], strict=True):
        finite.check(expert, name, value)


def _head(plan: CheckpointPlan, key: str, finite: _Finite) -> Iterator[Tensor]:
    """Yield the target's tensor of a head, or the mean over the experts in float64."""
    parts = [(plan.experts[number], name) for number, name in plan.heads[key].items()]
    if len(parts) == 1:
        expert, name = parts[0]
        for piece in flat_pieces(expert.home[name], name):
            finite.check(expert, name, piece)
            yield piece
        return
    values = [expert.read(name).double() for expert, name in parts]
    for (expert, name), value in zip(parts, values, strict=True):
        finite.check(expert, name, value)
    yield torch.stack(values).mean(0).view(-1)
