"""Read the modules of a file: their factors or their update, their alpha, and their place in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pimerge.adapters.format import Content, Ending, Place
from pimerge.adapters.formats._keys import (
    BIASES,
    HADAMARD,
    KRONECKER,
    NUMBERS,
    PRODUCTS,
    REFUSED,
    WHOLE,
    Group,
    grouped,
    shown,
)
from pimerge.adapters.formats._layouts import Shapes, layout_of, part_of, require, whole_update
from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import LoraModule, bias_key, in_layer
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import Problems

AlphaOf = Callable[[str, int], float]
"""Name of a module, rank → its alpha, where the file does not state one."""


def alpha_is_rank(name: str, rank: int) -> float:
    """Without an alpha the scaling is 1."""
    return float(rank)


@dataclass(frozen=True)
class ModuleReading:
    """How a format reads its modules.

    Attributes:
        ending: how the factors of a module are written whose update is computed.
        alpha: the alpha of a module whose alpha the file does not state.
        name: stem of the keys → name of the module.
        is_embedding: tells by name which modules are embeddings, if the keys do not.
    """

    ending: Ending
    alpha: AlphaOf = alpha_is_rank
    name: Callable[[str], str] = str
    is_embedding: Callable[[str], bool] = lambda name: False


def read_modules(file: TensorFile, reading: ModuleReading, config: Mapping[str, Any] | None = None) -> Content:
    """Read the modules of a file; every problem is raised by name.

    Args:
        config: fields for the config of the result.
    """
    problems = Problems()
    groups, unknown = grouped(file.entries)
    if unknown:
        problems.add(
            f"{len(unknown)} tensors belong to no update that pimerge reads: {shown(unknown)}",
            "leave them out of the file, or name the tool that wrote it in a report",
        )
    numbers = _numbers(file, groups, problems)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    modules: dict[str, LoraModule] = {}
    places: dict[str, Place] = {}
    entries = {}
    for stem in sorted(groups):
        group, name = groups[stem], reading.name(stem)
        if group.keys.keys() <= {*NUMBERS} and any(key.startswith(f"{stem}.") for key in unknown):
            continue  # its other tensors are reported
        module = _module(name, group, shapes, numbers.get(stem, {}), reading, problems)
        if module is None:
            continue
        if name in modules:
            problems.add(f"'{stem}' and '{places[name].stem}' name the same module", "leave one of them out")
            continue
        if module.layer == "linear" and reading.is_embedding(name):
            module = in_layer(module, "embedding")
        modules[name], places[name] = module, _place(group, reading, shapes)
        for slot, key in group.keys.items():
            if slot not in NUMBERS:
                entry = file.entries[key]
                turned = group.ending is not None and group.ending.transposed and slot in group.ending.slots
                if turned:
                    entry = entry._replace(shape=entry.shape[::-1], transposed=True)
                entries[module.key_of_slot.get(slot) or _key(name, slot)] = entry
    problems.raise_any("these updates cannot be read")
    merged = {"peft_type": _type(modules), "base_model_name_or_path": None, **(config or {})}
    return Content(merged, replace(file, entries=entries), dict(sorted(modules.items())), places)


def _key(name: str, slot: str) -> str:
    """The key that PEFT gives a tensor of a module."""
    endings = {"A": "lora_A.weight", "B": "lora_B.weight", "mid": "lora_mid.weight"}
    if slot == "bias" or slot in BIASES:
        return bias_key(name)
    return f"{PREFIX}{name}.{endings.get(slot, slot)}"


def _type(modules: Mapping[str, LoraModule]) -> str:
    """PEFT's type: of LoHa or LoKr if all modules are of that kind, otherwise LoRA."""
    slots = [set(module.key_of_slot) for module in modules.values()]
    for peft_type, own in (("LOHA", HADAMARD), ("LOKR", KRONECKER)):
        if slots and all(each & set(own) for each in slots):
            return peft_type
    return "LORA"


def _place(group: Group, reading: ModuleReading, shapes: Shapes) -> Place:
    slots = group.keys
    rows = tuple(shapes[slots[slot]][0] for slot in sorted(slots, key=part_of) if slot.startswith("B."))
    whole = next((slot for slot in (*WHOLE, *BIASES) if slot in slots), "") if group.ending is None else ""
    product = next((name for name, own in PRODUCTS.items() if set(slots) & set(own)), "")
    whole = "" if product else whole
    bias = next((slot for slot in ("bias", *BIASES) if slot in slots and slot != whole), "")
    return Place(group.stem, group.ending or reading.ending, whole, product, bias, "alpha" in slots, rows)


def _numbers(file: TensorFile, groups: Mapping[str, Group], problems: Problems) -> dict[str, dict[str, float]]:
    """Stem → slot → number, of the slots that hold one: its alpha and factors of its update."""
    places = {
        key: (stem, slot) for stem, group in groups.items() for slot, key in group.keys.items() if slot in NUMBERS
    }
    odd = [key for key in places if math.prod(file.entries[key].shape) != 1]
    if odd:
        problems.add(f"an alpha or a factor is one number, but not {shown(odd)}", "save the file again")
        return {}
    found: dict[str, dict[str, float]] = {}
    bad = []
    for key, array in file.arrays(places).items():
        stem, slot = places[key]
        found.setdefault(stem, {})[slot] = value = float(array.item())
        bad += [] if math.isfinite(value) else [key]
    if bad:
        problems.add(f"{shown(bad)} is NaN or Inf", "the training diverged, or the file is damaged")
    return found


def _module(
    name: str,
    group: Group,
    shapes: Shapes,
    numbers: Mapping[str, float],
    reading: ModuleReading,
    problems: Problems,
) -> LoraModule | None:
    """The update of a module; None, with a problem added, if the file does not determine it."""
    slots = {slot: key for slot, key in group.keys.items() if slot not in NUMBERS}
    factor_of_all = math.prod(value for slot, value in numbers.items() if slot != "alpha")
    refused = sorted(slots.keys() & REFUSED.keys())
    if refused:
        problems.add(f"{slots[refused[0]]}: {REFUSED[refused[0]]}", "train or save it as plain LoRA")
        return None
    own = {slot: shapes[key] for slot, key in slots.items()}
    if group.ending is not None and group.ending.transposed:
        own = {slot: shape[::-1] for slot, shape in own.items()}
    tensors = {slot: _key(name, slot) for slot in slots}
    biases = {slot: tensors.pop(slot) for slot in ("bias", *BIASES) if slot in tensors}

    def scaled(rank: int) -> float:
        require(rank > 0)
        alpha = numbers.get("alpha") or reading.alpha(name, rank)  # kohya takes an alpha of 0 for none
        return alpha / rank

    try:
        if not tensors and len(biases) == 1:
            module = whole_update(name, dict(biases), own)
            biases = {}
        else:
            module = layout_of(name, tensors, own, scaled)
    except (KeyError, ValueError, IndexError):
        found = ", ".join(f"{slot} {shape}" for slot, shape in sorted(own.items())) or "only an alpha"
        problems.add(
            f"module '{group.stem}' has {found}: these do not make up one update", "copy or save the file again"
        )
        return None
    if factor_of_all != 1:
        module = replace(module, scaling=factor_of_all * module.scaling, alpha=factor_of_all * module.alpha)
    if not biases:
        return module
    slot, key = next(iter(biases.items()))
    if len(biases) > 1 or own[slot] != (module.d_out,):
        problems.add(f"{group.keys[slot]} is {own[slot]}, expected ({module.d_out},)", "save the file again")
        return None
    factor = 1.0 if slot == "bias" or not module.scaling else 1 / module.scaling
    return replace(module, bias=key, bias_factor=factor)
