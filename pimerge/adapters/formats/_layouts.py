"""The layouts of updates: which slots make up one, their shapes and the formula of ΔW.

Shapes that do not fit raise ValueError, and a slot that is missing KeyError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pimerge.adapters.computed_module import ComputedModule, Read
from pimerge.adapters.formats import _updates
from pimerge.adapters.formats._keys import HADAMARD, KRONECKER, WHOLE
from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import FLATTENED, LoraModule

Shapes = Mapping[str, tuple[int, ...]]
Scaling = Callable[[int], float]
"""Rank of a module → its scaling."""


def part_of(slot: str) -> int:
    """The number of the part in a slot such as ``B.10``."""
    return int(slot.partition(".")[2] or -1)


def layout_of(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    """The update of a module by its slots; a slot that is missing raises KeyError, one too many ValueError."""
    slots = set(keys)
    if slots == {"A", "B"}:
        return _low_rank(name, keys, shapes, scaling)
    if parts := sorted({part_of(slot) for slot in slots if slot.startswith(("A.", "B."))}):
        require(slots == {f"{half}.{part}" for half in "AB" for part in range(len(parts))})
        return _split(name, keys, shapes, scaling, len(parts))
    if slots == {"A", "B", "mid"}:
        A, B, core = shapes["A"], shapes["B"], shapes["mid"]
        require(core[:2] == (B[1], A[0]))
        shape = (B[0], A[1], *core[2:])
        return _computed(name, keys, shapes, shape, min(core[:2]), scaling(A[0]), _updates.with_core)
    if slots in ({*HADAMARD[:4]}, {*HADAMARD}):
        return _hadamard(name, keys, shapes, scaling)
    if slots <= {*KRONECKER}:
        return _kronecker(name, keys, shapes, scaling)
    require(len(slots & {*WHOLE}) == len(slots) == 1)
    return whole_update(name, keys, shapes)


def _low_rank(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    A, B = shapes["A"], shapes["B"]
    require(len(A) >= 2 and len(B) >= 2 and A[0] == B[1] and 0 not in (*A, *B) and math.prod(B[2:]) == 1)
    rank = A[0]
    factor = scaling(rank)
    layer = "conv" if len(A) > 2 else "linear"
    return LoraModule(name, keys["A"], keys["B"], None, rank, factor * rank, factor, layer, A, B)


def _split(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling, count: int) -> LoraModule:
    """A module whose rows are split between parts of one rank, whose scaling is alpha / rank."""
    pairs = [(shapes[f"A.{part}"], shapes[f"B.{part}"]) for part in range(count)]
    rank, d_in = pairs[0][0]
    require(all((rank, d_in) == A and len(B) == 2 and B[1] == rank for A, B in pairs))
    rows = sum(B[0] for _, B in pairs)
    return _computed(name, keys, shapes, (rows, d_in), count * rank, scaling(rank), _updates.split, "linear")


def _hadamard(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    rank = shapes["hada_w1_b"][0]
    if "hada_t1" in keys:
        shape = (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
        require(all(shapes[f"hada_t{number}"][2:] == shape[2:] for number in (1, 2)))
    else:
        shape = (shapes["hada_w1_a"][0], *shapes["hada_w1_b"][1:])
        require(shapes["hada_w2_a"][0] == shape[0] and shapes["hada_w2_b"][1:] == shape[1:])
    bound = rank * shapes["hada_w2_b"][0]
    return _computed(name, keys, shapes, shape, bound, scaling(rank), _updates.hadamard)


def _kronecker(name: str, keys: Mapping[str, str], shapes: Shapes, scaling: Scaling) -> LoraModule:
    """LoKr; with both matrices whole the scaling is 1 (``LokrModule.__init__``), whatever alpha the file states."""
    factors = [_kronecker_factor(f"lokr_w{number}", f"lokr_t{number}", shapes) for number in (1, 2)]
    used = {slot for factor in factors for slot in factor.slots}
    require(used == set(keys))
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
        require(shapes[core][:2] == (a[0], b[0]))
        return _KroneckerFactor((*slots, core), (a[1], b[1], *shapes[core][2:]), b[0], b[0])
    require(a[1] == b[0])
    return _KroneckerFactor(slots, (a[0], *b[1:]), b[0], b[0])


def whole_update(name: str, keys: Mapping[str, str], shapes: Shapes) -> LoraModule:
    slot = next(iter(keys))
    shape = shapes[slot] if len(shapes[slot]) > 1 else (shapes[slot][0], 1)
    require(len(shapes[slot]) > 0 and 0 not in shape)
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
    require(rank > 0)
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


def require(condition: bool) -> None:
    if not condition:
        raise ValueError
