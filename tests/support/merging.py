"""A whole merge in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pimerge.adapters.expert import Expert
from pimerge.adapters.low_rank import Truncation
from pimerge.adapters.merged_module import MergedModule
from pimerge.merging.method import open_method
from pimerge.merging.preparation import prepare
from pimerge.merging.request import EntrySpace
from pimerge.merging.update_merge import UpdateSettings


def merge(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: str = "interpolated",
    options: Mapping[str, Any] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    space: str = "core",
    selected: Callable[[str], bool] = lambda name: True,
    **settings: Any,
) -> list[MergedModule]:
    """Every module of a merge."""
    chosen = open_method(method, options, seed)
    found = UpdateSettings(truncation=Truncation(rank, energy), space=EntrySpace(space), **settings)
    prepared = prepare(experts, weights, chosen, found, selected)
    return [prepared.module(name) for name in prepared.names]
