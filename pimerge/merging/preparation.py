"""Check a merge of updates ΔW before the first module is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pimerge.adapters.compatibility import refuse_copied_layers, require_shared_form
from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.token_modules import require_one_shape
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.method import OpenedMethod, Space
from pimerge.merging.request import EntrySpace
from pimerge.merging.update_merge import UpdateMerge, UpdateSettings, widest

_DEFAULTS = UpdateSettings()


def prepare(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: OpenedMethod,
    settings: UpdateSettings = _DEFAULTS,
    selected: Callable[[str], bool] = lambda name: True,
) -> UpdateMerge:
    """Check a merge of compatible experts; :meth:`UpdateMerge.module` then computes its modules one by one.

    An expert that does not adapt a module contributes a zero update there, and the weights do not change. Equal
    experts are joined, and their weights are added.

    Args:
        weights: one weight per expert, for all modules or by module.
        selected: tells by name which modules to merge; the others are left out of the result.
    """
    if settings.space is not EntrySpace.CORE and method.space is not Space.ELEMENTWISE:
        raise PimergeError(f"--space applies to elementwise methods, not to '{method.name}'", "leave it out")
    found = sorted({name for expert in experts for name in expert.modules})
    names = [name for name in found if selected(name)]
    if not names:
        raise PimergeError(
            "no module is left to merge",
            f"the experts have {len(found)}, such as '{found[0]}'; look at --include and --exclude",
        )
    by_module = _weights_by_module(found, weights, len(experts))
    kept, totals, joined = _joined(experts, {name: by_module[name] for name in names})
    chosen = {**vars(settings), "dtype": settings.dtype or widest(expert.dtypes for expert in experts)}
    merge = UpdateMerge(experts=kept, weights=totals, method=method, joined=joined, **chosen)
    if merge.by_factor:
        require_one_shape(kept)
        require_shared_form(kept)
    return merge


def _joined(
    experts: Sequence[Expert], weights: Mapping[str, Sequence[float]]
) -> tuple[list[Expert], dict[str, list[float]], dict[str, int]]:
    """Join equal experts and add their weights: the experts, weights by module, and name → count of each."""
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
    """Return a key that equal experts share; the whole file is hashed only if two files begin in the same way."""
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
        problems.add(f"there are weights for {len(unknown)} modules that no expert has, such as '{unknown[0]}'")
    missing = [name for name in names if name not in by_module]
    if missing:
        problems.add(
            f"there are no weights for {len(missing)} modules, such as '{missing[0]}'", "pass weights for these experts"
        )
    for name, values in by_module.items():
        if len(values) != count or not all(torch.isfinite(torch.tensor(value)) for value in values):
            problems.add(f"{len(values)} weights ({', '.join(map(str, values))}) for {count} experts in '{name}'")
            break
    problems.raise_any("the weights do not match the experts")
    return by_module


def reader_of(experts: Sequence[Expert]) -> Callable[[Expert, str], Factors]:
    """Return the reader of the experts' factors; it converts adapters that need the weights of the base."""
    from pimerge.adapters.base_weights import base_weights
    from pimerge.adapters.conversion import converting

    layouts = {name: module for e in experts for name, module in e.modules.items() if module.conversions}
    if not layouts:
        return Expert.factors
    refuse_copied_layers(experts)
    transposed = any(bool(expert.config.get("fan_in_fan_out")) for expert in experts)
    return converting(base_weights(experts[0].base, layouts, fan_in_fan_out=transposed))


def statistics_of(store_path: Path, experts: Sequence[Expert], method: OpenedMethod) -> dict[str, Any]:
    """Return the statistics that a method needs from the store: ``fisher`` or ``gram`` of :class:`UpdateSettings`."""
    if not {"fishers", "grams"} & set(method.needs):
        return {}
    from pimerge.embedding.store import open_store

    store = open_store(store_path)
    problems = Problems()
    files = {}
    has_grams = "grams" in method.needs
    command = "pimerge embed --grams" if has_grams else "pimerge embed"
    for expert in experts:
        name = store.find_sha(expert.sha256)
        if name is None:
            problems.add(f"'{expert.name}' is not in the store '{store_path}'", f"run '{command} {expert.path}' first")
            continue
        with problems.collected(f"'{expert.name}': "):
            files[expert.sha256] = store.grams(name) if has_grams else store.diagonal_file(name)
    problems.raise_any(f"the store lacks statistics that '{method.name}' needs")

    def fisher(expert: Expert, key: str) -> Tensor:
        return files[expert.sha256].read(key)

    def gram(expert: Expert, module: str) -> Tensor | None:
        file = files[expert.sha256]
        return file.read(module) if module in file.entries else None

    return {"gram": gram} if has_grams else {"fisher": fisher}
