"""LoKr: Kronecker products of two small matrices, whole or of low rank (LyCORIS, arXiv 2309.14859).

    ΔW = s · W₁ ⊗ W₂ = s · (B₁ ⊗ B₂) (A₁ ⊗ A₂),   W_N = B_N A_N,   s = alpha / r

Layout: lokr_wN is W_N whole; else lokr_wN_a is B_N (rows × r) and lokr_wN_b is A_N (r × columns). The kernel of a
convolution is W₂'s: folded into its columns, or with ``use_effective_conv2d`` A₂ = lokr_t2 (r × r × kernel) times
lokr_w2_b, and lokr_w2_a is B₂ᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._relatives import (
    BASE_HINT,
    CONVOLUTION,
    Read,
    Relative,
    fresh_fields,
    key_of_parameter,
    parse_modules,
    relative,
    require_slots,
    usual_places,
)
from pimerge.adapters.lora_module import pattern_value
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor


_SLOTS = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_HARMLESS = (
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "use_effective_conv2d",
    "decompose_both",
    "decompose_factor",
)


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of this kind; see :mod:`pimerge.adapters.kind`."""
    config, shapes, layers = header.config, header.shapes, header.layers
    return parse_modules(config, shapes, layers, _SLOTS, _HARMLESS, "LoKr", _module)


def _module(
    name: str,
    slots: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    weight: tuple[int, ...] | None,
) -> Relative:
    parts = [{f"lokr_w{n}"} if f"lokr_w{n}" in slots else {f"lokr_w{n}_a", f"lokr_w{n}_b"} for n in (1, 2)]
    has_core = "lokr_t2" in slots and "lokr_w2" not in slots
    require_slots(slots, set.union(*parts, {"lokr_t2"} if has_core else set()))
    own = {slot: shapes[key] for slot, key in slots.items()}
    r = int(pattern_value(config["rank_pattern"] or {}, name, config["r"]))
    _require_dimensions(own, r)
    full = own.get("lokr_w2")
    first = own.get("lokr_w1") or (own["lokr_w1_a"][0], own["lokr_w1_b"][1])
    second = full or (own["lokr_w2_a"][1 if has_core else 0], own["lokr_w2_b"][1], *own.get("lokr_t2", ())[2:])
    if weight is None and len(second) > 2:
        raise PimergeError(CONVOLUTION, BASE_HINT)
    size = first[0] * second[0], first[1] * math.prod(second[1:])
    weight = weight or size
    if size != (weight[0], math.prod(weight[1:])):
        raise PimergeError(f"ΔW is {size}, the base's weight {weight}", BASE_HINT)
    rank = min(first) if "lokr_w1" in own else r
    rank *= min(second[0], math.prod(second[1:])) if full else r
    alpha = float(pattern_value(config["alpha_pattern"] or {}, name, config["alpha"]))
    if full and len(full) == 3:
        return relative(name, weight, size[0], alpha, alpha / r, slots, shapes, partial(_build_whole, slots, size))
    return relative(name, weight, rank, alpha, alpha / r, slots, shapes, partial(_build, slots))


def _require_dimensions(own: Mapping[str, tuple[int, ...]], r: int) -> None:
    """Check that the tensors are matrices, or kernels of such, and the low ranks those of the config."""
    most = {"lokr_w2": (2, 3, 4), "lokr_t2": (4,)}
    inner = {"lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 0 if "lokr_t2" in own else 1, "lokr_w2_b": 0}
    for slot, shape in own.items():
        if len(shape) not in most.get(slot, (2,)) or 0 in shape:
            raise PimergeError(f"{slot} is {shape}, expected a matrix or its kernel", "save the adapter again")
        if (slot in inner and shape[inner[slot]] != r) or (slot == "lokr_t2" and shape[:2] != (r, r)):
            raise PimergeError(
                f"{slot} is {shape}, and adapter_config.json says rank {r}",
                "the config belongs to another adapter; save both together",
            )


def _build(slots: Mapping[str, str], read: Read) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = (_pair(slots, number, read) for number in (1, 2))
    return _kron(A1, A2), _kron(B1, B2)


def _kron(X: Tensor, Y: Tensor) -> Tensor:
    """X ⊗ Y of matrices; ``torch.kron`` fails on some of the strides that an einsum leaves."""
    return (X[:, None, :, None] * Y[None, :, None, :]).flatten(2).flatten(0, 1)


def _pair(slots: Mapping[str, str], number: int, read: Read) -> tuple[Tensor, Tensor]:
    """A (r × columns) and B (rows × r) of one matrix, its kernel folded into the columns."""
    import torch

    if whole := slots.get(f"lokr_w{number}"):
        matrix = read(whole).double().flatten(1)
        rows, columns = matrix.shape
        one = torch.eye(min(rows, columns), dtype=matrix.dtype)
        return (matrix, one) if rows <= columns else (one, matrix)
    left, right = (read(slots[f"lokr_w{number}_{letter}"]).double() for letter in "ab")
    if number == 1 or "lokr_t2" not in slots:
        return right, left
    core = read(slots["lokr_t2"]).double()
    return torch.einsum("ijkl,jr->irkl", core, right).flatten(1), left.T


def _build_whole(slots: Mapping[str, str], size: tuple[int, int], read: Read) -> tuple[Tensor, Tensor]:
    """A kernel of one dimension: PEFT aligns the axes of W₁ with the last two of W₂, not with the first two."""
    import torch

    A1, B1 = _pair(slots, 1, read)
    delta = torch.kron(B1 @ A1, read(slots["lokr_w2"]).double()).reshape(size)
    return delta, torch.eye(size[0], dtype=delta.dtype)


KIND = Kind(
    name="lokr",
    summary="Kronecker products of two small matrices.",
    formula="ΔW = s · W₁ ⊗ W₂",
    paper="LyCORIS (arXiv 2309.14859)",
    peft_type="LOKR",
    has_update=True,
    reads_base=True,
    init_slots=("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
