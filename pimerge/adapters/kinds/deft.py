"""DEFT: a part of W is replaced by a low-rank matrix; ΔW is relative to the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="DEFT",
        slots="deft_",
        rank=lambda shapes: shapes["deft_P"][-1],
        needs_weight=lambda config: True,
        on_weight=True,
        since="0.20",
    ),
    name="deft",
    summary="A low-rank part of a matrix is replaced.",
    formula="ΔW = Q (R − Pᵀ W)",
    paper="DEFT (PEFT 0.20)",
)
