"""Shared by the kinds without ΔW: parsing, and fields of a fresh expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pimerge.adapters.keys import PREFIX, sort_keys
from pimerge.adapters.kind import AdapterHeader, TensorSets
from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot
from pimerge.core.errors import PimergeError, Problems


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """Fields of PEFT's config for a fresh expert of a kind without a size; see :mod:`pimerge.adapters.kind`.

    >>> fresh_fields(None, ["q_proj"])
    {'target_modules': ['q_proj']}
    """
    if size is not None:
        raise PimergeError(
            f"--fresh-rank is {size}, but this kind of expert has no size",
            "leave it out: it is the rank of a LoRA, or the size of a bottleneck, a prefix or a prompt",
        )
    return {"target_modules": list(modules)} if modules else {}


def of_all_modules(experts: Sequence[TensorSets]) -> tuple[list[TensorSets], dict[str, Any]]:
    """Give every expert the modules of all; one that it does not adapt is as in an expert that changes nothing.

    Returns:
        The tensor sets of each expert, and the field that names their modules; experts of the same modules as they are.
    """
    every: TensorSets = {name: group for sets in experts for name, group in sets.items()}
    if all(sets.keys() == every.keys() for sets in experts):
        return list(experts), {}
    return [{name: sets.get(name) or _neutral(every[name]) for name in sorted(every)} for sets in experts], {
        "target_modules": sorted(every),
        "exclude_modules": None,
    }


def _neutral(group: TensorSet) -> TensorSet:
    return TensorSet(group.name, {name: replace(slot, is_stored=False) for name, slot in group.slots.items()})


def parse_tensor_sets(
    header: AdapterHeader,
    pattern: re.Pattern[str],
    what: str,
    slot: Callable[[str, str, str, tuple[int, ...]], TensorSlot | str],
    needed: frozenset[str],
    *,
    fields: type[CommonFields] = CommonFields,
) -> tuple[dict[str, TensorSet], dict[str, str]]:
    """Read the tensor sets of an expert, one for each module, and its head.

    Args:
        pattern: matches a key without PEFT's prefix, with the groups ``module`` and ``slot``.
        what: name of the kind's tensors in messages.
        slot: (module, slot, key, shape) → the slot, or the problem of its shape.
        needed: the slots that every module must have.
        fields: the fields of the config that are read.
    """

    def slot_of(key: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        return (match["module"], match["slot"]) if match else None

    problems = Problems()
    faulty = faulty_fields(fields, header.config, problems)
    config = {field: value for field, value in header.config.items() if field not in faulty}
    shapes = header.shapes
    keys, head = sort_keys(config, shapes, slot_of, what, problems)
    sets = {}
    for module in sorted(keys):
        found = {name: slot(module, name, key, shapes[key]) for name, key in sorted(keys[module].items())}
        for name, each in found.items():
            if isinstance(each, str):
                problems.add(f"module '{module}': {name} is {shapes[keys[module][name]]}, {each}", "save it again")
        if missing := needed - found.keys():
            problems.add(f"module '{module}' has no {' and '.join(sorted(missing))}", "save the adapter again")
        sets[module] = TensorSet(module, {name: each for name, each in found.items() if isinstance(each, TensorSlot)})
    problems.raise_any(f"these {what} cannot be used")
    return sets, head
