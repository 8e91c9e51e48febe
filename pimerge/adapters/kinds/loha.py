"""LoHa: Hadamard products of two low-rank updates (FedPara, arXiv 2108.06098)."""

from __future__ import annotations

from pimerge.adapters.kind import Shapes
from pimerge.adapters.peft_kind import BASE_HINT, CONVOLUTION, fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta
from pimerge.core.errors import PimergeError


def _weight(shapes: Shapes) -> tuple[int, ...]:
    if "hada_t1" in shapes:
        raise PimergeError(CONVOLUTION, BASE_HINT)
    return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]


KIND = peft_kind(
    PeftDelta(
        peft_type="LOHA",
        slots="hada_",
        rank=lambda shapes: shapes["hada_w1_b"][0] ** 2,  # products of all pairs of columns and rows
        weight=_weight,
    ),
    name="loha",
    summary="Hadamard products of two low-rank updates.",
    formula="ΔW = s · (B₁ A₁) ⊙ (B₂ A₂), s = alpha / r",
    paper="FedPara (arXiv 2108.06098)",
    init_slots=("hada_w1_a", "hada_w1_b", "hada_w2_a"),
    fresh_fields=fresh_fields,
)
