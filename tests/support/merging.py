"""A whole merge in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pimerge.adapters.expert import Expert
from pimerge.adapters.low_rank import MergedModule, Truncation
from pimerge.merging.merge import prepare
from pimerge.merging.method import open_method


def merge(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: str = "interpolated",
    options: Mapping[str, Any] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[MergedModule]:
    """Every module of a merge."""
    chosen = open_method(method, options, seed)
    prepared = prepare(experts, weights, chosen, truncation=Truncation(rank, energy), **settings)
    return [prepared.module(name) for name in prepared.names]
