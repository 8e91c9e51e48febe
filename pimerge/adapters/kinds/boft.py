"""BOFT: an orthogonal matrix as a product of sparse ones (arXiv 2311.06243); ΔW is relative to the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta, merged_delta

KIND = peft_kind(
    PeftDelta(
        peft_type="BOFT",
        slots="boft_",
        delta=merged_delta,
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="boft",
    summary="A product of sparse orthogonal matrices.",
    formula="ΔW = s ∘ (W R) − W, R a product of butterfly factors",
    paper="BOFT (arXiv 2311.06243)",
)
