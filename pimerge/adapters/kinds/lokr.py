"""LoKr: Kronecker products of two small matrices, full or low-rank (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math

from pimerge.adapters.kind import Shapes
from pimerge.adapters.peft_kind import BASE_HINT, CONVOLUTION, fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta
from pimerge.core.errors import PimergeError


def _factor(shapes: Shapes, number: int) -> tuple[int, ...]:
    """The shape of W_N."""
    name = f"lokr_w{number}"
    return shapes[name] if name in shapes else (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])


def _weight(shapes: Shapes) -> tuple[int, ...]:
    if "lokr_t2" in shapes or len(shapes.get("lokr_w2", ())) > 2:
        raise PimergeError(CONVOLUTION, BASE_HINT)
    (rows, columns), (more_rows, more_columns) = _factor(shapes, 1), _factor(shapes, 2)
    return rows * more_rows, columns * more_columns


def _rank(shapes: Shapes) -> int | None:
    """The rank of W₁ times the rank of W₂; no bound for a one-dimensional kernel, which PEFT aligns differently."""
    if len(shapes.get("lokr_w2", ())) == 3:
        return None
    ranks = []
    for number in (1, 2):
        rows, *columns = _factor(shapes, number)
        low = shapes.get(f"lokr_w{number}_b", (rows,))[0]
        ranks.append(low if f"lokr_w{number}_b" in shapes else min(rows, math.prod(columns)))
    return math.prod(ranks)


KIND = peft_kind(
    PeftDelta(peft_type="LOKR", slots="lokr_", rank=_rank, weight=_weight),
    name="lokr",
    summary="Kronecker products of two small matrices.",
    formula="ΔW = s · W₁ ⊗ W₂, W_N full or B_N A_N, s = alpha / r",
    paper="LyCORIS (arXiv 2309.14859)",
    init_slots=("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    fresh_fields=fresh_fields,
)
