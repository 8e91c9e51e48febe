"""LoHa: Hadamard products of two low-rank updates (FedPara, arXiv 2108.06098).

    ΔW = s · (B₁ A₁) ⊙ (B₂ A₂) = s · Σ_ij (b₁ᵢ ⊙ b₂ⱼ) (a₁ᵢ ⊙ a₂ⱼ)ᵀ,   s = alpha / r

So ΔW has at most the rank r², and its factors are the products of all pairs of columns and rows. Layout: hada_wN_a is
(d_out × r), hada_wN_b (r × d_in); with ``use_effective_conv2d`` (r × d_out) and (r × d_in), and A_N, folded to
(r × d_in·kernel), is hada_tN (r × r × kernel) times hada_wN_b.
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
    require_shapes,
    require_slots,
    usual_places,
)
from pimerge.adapters.lora_module import pattern_value
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor


_PAIRS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})
_HARMLESS = ("rank_dropout", "module_dropout", "use_effective_conv2d")


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of this kind; see :mod:`pimerge.adapters.kind`."""
    config, shapes, layers = header.config, header.shapes, header.layers
    return parse_modules(config, shapes, layers, _PAIRS | _CORES, _HARMLESS, "LoHa", _module)


def _module(
    name: str,
    slots: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    weight: tuple[int, ...] | None,
) -> Relative:
    rank = pattern_value(config["rank_pattern"] or {}, name, config["r"])
    has_cores = not _CORES.isdisjoint(slots)
    require_slots(slots, _PAIRS | _CORES if has_cores else _PAIRS)
    if has_cores and weight is None:
        raise PimergeError(CONVOLUTION, BASE_HINT)
    first, second = (shapes[slots[f"hada_w1_{letter}"]] for letter in "ab")
    weight = weight or ((*first, 0)[0], (0, *second)[-1])
    d_out, d_in = weight[0], weight[1] if has_cores else math.prod(weight[1:])
    sides = {"a": (rank, d_out) if has_cores else (d_out, rank), "b": (rank, d_in)}
    wanted = {f"hada_w{number}_{letter}": shape for number in (1, 2) for letter, shape in sides.items()}
    core = (rank, rank, *weight[2:], 1)[:4]
    require_shapes(slots, shapes, wanted | (dict.fromkeys(_CORES, core) if has_cores else {}))
    alpha = float(pattern_value(config["alpha_pattern"] or {}, name, config["alpha"]))
    return relative(name, weight, rank**2, alpha, alpha / rank, slots, shapes, partial(_build, slots))


def _build(slots: Mapping[str, str], read: Read) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = (_pair(slots, number, read) for number in (1, 2))
    A = (A1[:, None] * A2[None]).flatten(0, 1)  # (r² × d_in)
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)  # (d_out × r²)
    return A, B


def _pair(slots: Mapping[str, str], number: int, read: Read) -> tuple[Tensor, Tensor]:
    import torch

    first, second = (read(slots[f"hada_w{number}_{letter}"]).double() for letter in "ab")
    if "hada_t1" not in slots:
        return second, first
    core = read(slots[f"hada_t{number}"]).double()
    return torch.einsum("ijkl,jr->irkl", core, second).flatten(1), first.T


KIND = Kind(
    name="loha",
    summary="Hadamard products of two low-rank updates.",
    formula="ΔW = s · (B₁ A₁) ⊙ (B₂ A₂)",
    paper="FedPara (arXiv 2108.06098)",
    peft_type="LOHA",
    has_update=True,
    reads_base=True,
    init_slots=("hada_w1_a", "hada_w1_b", "hada_w2_a"),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
