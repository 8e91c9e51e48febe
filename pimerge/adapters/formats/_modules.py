"""Read the modules of a file: their factors or their update, their alpha, and their place in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pimerge.adapters.computed_module import ComputedModule, Read
from pimerge.adapters.format import Content, Ending, Place
from pimerge.adapters.formats import _updates
from pimerge.adapters.formats._keys import BIASES, HADAMARD, KRONECKER, PRODUCTS, REFUSED, WHOLE, Group, grouped, shown
from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import FLATTENED, LoraModule, bias_key
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import Problems

Shapes = Mapping[str, tuple[int, ...]]
AlphaOf = Callable[[str, int], float]
"""Name of a module, rank → its alpha, where the file does not state one."""
Scaling = Callable[[int], float]
"""Rank of a module → its scaling."""


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
    """

    ending: Ending
    alpha: AlphaOf = alpha_is_rank
    name: Callable[[str], str] = str


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
    alphas = _alphas(file, groups, problems)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    modules: dict[str, LoraModule] = {}
    places: dict[str, Place] = {}
    entries = {}
    for stem in sorted(groups):
        group, name = groups[stem], reading.name(stem)
        module = _module(name, group, shapes, alphas.get(stem), reading, problems)
        if module is None:
            continue
        if name in modules:
            problems.add(f"'{stem}' and '{places[name].stem}' name the same module", "leave one of them out")
            continue
        modules[name], places[name] = module, _place(group, reading)
        for slot, key in group.keys.items():
            if slot != "alpha":
                entry = file.entries[key]
                turned = group.ending is not None and group.ending.transposed and slot in group.ending.slots
                if turned:
                    entry = entry._replace(shape=entry.shape[::-1], transposed=True)
                entries[_key(name, slot)] = entry
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


def _place(group: Group, reading: ModuleReading) -> Place:
    slots = group.keys
    whole = next((slot for slot in (*WHOLE, *BIASES) if slot in slots), "") if group.ending is None else ""
    product = next((name for name, own in PRODUCTS.items() if set(slots) & set(own)), "")
    whole = "" if product else whole
    bias = next((slot for slot in ("bias", *BIASES) if slot in slots and slot != whole), "")
    return Place(group.stem, group.ending or reading.ending, whole, product, bias, "alpha" in slots)


def _alphas(file: TensorFile, groups: Mapping[str, Group], problems: Problems) -> dict[str, float]:
    """Stem → the alpha that the file states."""
    keys = {stem: group.keys["alpha"] for stem, group in groups.items() if "alpha" in group.keys}
    odd = [key for key in keys.values() if math.prod(file.entries[key].shape) != 1]
    if odd:
        problems.add(f"an alpha is one number, but not {shown(odd)}", "save the file again")
        return {}
    found = {stem: float(array.item()) for stem, array in zip(keys, file.arrays(keys.values()).values(), strict=True)}
    if bad := [keys[stem] for stem, value in found.items() if not math.isfinite(value)]:
        problems.add(f"{shown(bad)} is NaN or Inf", "the training diverged, or the file is damaged")
    return found


def _module(
    name: str, group: Group, shapes: Shapes, alpha: float | None, reading: ModuleReading, problems: Problems
) -> LoraModule | None:
    """The update of a module; None, with a problem added, if the file does not determine it."""
    slots = {slot: key for slot, key in group.keys.items() if slot != "alpha"}
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
        _require(rank > 0)
        return (alpha or reading.alpha(name, rank)) / rank  # kohya takes an alpha of 0 for none

    try:
        if not tensors and len(biases) == 1:
            module = _whole(name, dict(biases), own)
            biases = {}
        else:
            module = _read(name, tensors, own, scaled)
    except (KeyError, ValueError, IndexError):
        found = ", ".join(f"{slot} {shape}" for slot, shape in sorted(own.items())) or "only an alpha"
        problems.add(
            f"module '{group.stem}' has {found}: these do not make up one update", "copy or save the file again"
        )
        return None
    if not biases:
        return module
    slot, key = next(iter(biases.items()))
    if len(biases) > 1 or own[slot] != (module.d_out,):
        problems.add(f"{group.keys[slot]} is {own[slot]}, expected ({module.d_out},)", "save the file again")
        return None
    factor = 1.0 if slot == "bias" or not module.scaling else 1 / module.scaling
    return replace(module, bias=key, bias_factor=factor)


def _read(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    """The update of a module by its slots; a slot that is missing raises KeyError, one too many ValueError."""
    slots = set(keys)
    if slots == {"A", "B"}:
        return _low_rank(name, keys, shapes, scaling)
    if slots == {"A", "B", "mid"}:
        A, B, core = shapes["A"], shapes["B"], shapes["mid"]
        _require(core[:2] == (B[1], A[0]))
        shape = (B[0], A[1], *core[2:])
        return _computed(name, keys, shapes, shape, min(core[:2]), scaling(A[0]), _updates.with_core)
    if slots in ({*HADAMARD[:4]}, {*HADAMARD}):
        return _hadamard(name, keys, shapes, scaling)
    if slots <= {*KRONECKER}:
        return _kronecker(name, keys, shapes, scaling)
    _require(len(slots & {*WHOLE}) == len(slots) == 1)
    return _whole(name, keys, shapes)


def _low_rank(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    A, B = shapes["A"], shapes["B"]
    _require(len(A) >= 2 and len(B) >= 2 and A[0] == B[1] and 0 not in (*A, *B) and math.prod(B[2:]) == 1)
    rank = A[0]
    factor = scaling(rank)
    layer = "conv" if len(A) > 2 else "linear"
    return LoraModule(name, keys["A"], keys["B"], None, rank, factor * rank, factor, layer, A, B)


def _hadamard(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    rank = shapes["hada_w1_b"][0]
    if "hada_t1" in keys:
        shape = (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
        _require(all(shapes[f"hada_t{number}"][2:] == shape[2:] for number in (1, 2)))
    else:
        shape = (shapes["hada_w1_a"][0], *shapes["hada_w1_b"][1:])
        _require(shapes["hada_w2_a"][0] == shape[0] and shapes["hada_w2_b"][1:] == shape[1:])
    bound = rank * shapes["hada_w2_b"][0]
    return _computed(name, keys, shapes, shape, bound, scaling(rank), _updates.hadamard)


def _kronecker(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    """LoKr; with both matrices whole the scaling is 1 (``LokrModule.__init__``), whatever alpha the file states."""
    factors = [_kronecker_factor(f"lokr_w{number}", f"lokr_t{number}", shapes) for number in (1, 2)]
    used = {slot for factor in factors for slot in factor.slots}
    _require(used == set(keys))
    dims = [factor.dim for factor in factors if factor.dim]
    factor = scaling(dims[-1]) if dims else 1.0
    (rows, columns), (more_rows, more_columns, *kernel) = (factor.shape for factor in factors)
    shape = (rows * more_rows, columns * more_columns, *kernel)
    bound = math.prod(factor.rank for factor in factors)
    return _computed(name, keys, shapes, shape, bound, factor, _updates.kronecker)


@dataclass(frozen=True)
class _KroneckerFactor:
    """W_1 or W_2 of LoKr: its slots, its shape, a bound of its rank, and the dim that alpha is divided by (0: none)."""

    slots: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int
    dim: int = 0


def _kronecker_factor(whole: str, core: str, shapes: Shapes) -> _KroneckerFactor:
    if whole in shapes:
        rows, *columns = shapes[whole]
        return _KroneckerFactor((whole,), shapes[whole], min(rows, math.prod(columns)))
    a, b = shapes[f"{whole}_a"], shapes[f"{whole}_b"]
    slots = (f"{whole}_a", f"{whole}_b")
    if core in shapes:
        _require(shapes[core][:2] == (a[0], b[0]))
        return _KroneckerFactor((*slots, core), (a[1], b[1], *shapes[core][2:]), b[0], b[0])
    _require(a[1] == b[0])
    return _KroneckerFactor(slots, (a[0], *b[1:]), b[0], b[0])


def _whole(name: str, keys: Mapping[str, str], shapes: Shapes) -> LoraModule:
    slot = next(iter(keys))
    shape = shapes[slot] if len(shapes[slot]) > 1 else (shapes[slot][0], 1)
    _require(len(shapes[slot]) > 0 and 0 not in shape)
    return _computed(name, keys, shapes, shape, min(shape[0], math.prod(shape[1:])), 1.0, _updates.whole, "linear")


def _computed(
    name: str,
    keys: Mapping[str, str],
    shapes: Shapes,
    shape: tuple[int, ...],
    bound: int,
    scaling: float,
    update: Callable[[Read, Mapping[str, str]], Any],
    layer: str = FLATTENED,
) -> ComputedModule:
    """A module whose ΔW a formula gives.

    Args:
        shape: of ΔW, (d_out, d_in, *kernel).
        bound: upper bound of its rank.
        layer: the layer's type if ``shape`` has no kernel.
    """
    d_out, *inputs = shape
    rank = min(d_out, math.prod(inputs), bound)
    _require(rank > 0)
    kernel = inputs[1:]
    return ComputedModule(
        name=name,
        A=f"{PREFIX}{name}.lora_A.weight",
        B=f"{PREFIX}{name}.lora_B.weight",
        bias=None,
        rank=rank,
        alpha=scaling * rank,
        scaling=scaling,
        layer="conv" if kernel else layer,
        shape_A=(rank, *inputs),
        shape_B=(d_out, rank, *(1 for _ in kernel)),
        slots=dict(sorted(keys.items())),
        shapes={slot: shapes[slot] for slot in sorted(keys)},
        dense=partial(_dense, update, dict(keys)),
    )


def _dense(update: Callable[[Read, Mapping[str, str]], Any], keys: Mapping[str, str], read: Read, weight: Any) -> Any:
    """ΔW without its scaling; it does not depend on the base's weight."""
    return update(read, keys)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError
