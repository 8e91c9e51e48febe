"""HRA: a chain of Householder reflections (arXiv 2405.17484); ΔW is relative to the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta, merged_delta

KIND = peft_kind(
    PeftDelta(
        peft_type="HRA",
        slots="hra_",
        delta=merged_delta,
        rank=lambda shapes: shapes["hra_u"][-1],
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="hra",
    summary="A chain of Householder reflections.",
    formula="ΔW = W Π_i (I − 2 u_i u_iᵀ) − W",
    paper="HRA (arXiv 2405.17484)",
)
