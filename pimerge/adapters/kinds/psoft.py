"""PSOFT: an orthogonal matrix within the principal subspace of W; ΔW is relative to the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="PSOFT",
        slots="psoft_",
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="psoft",
    slots=("psoft_R.vector_", "psoft_"),
    summary="A rotation within the principal subspace of a matrix.",
    formula="ΔW = A (R − I) B, A B the leading part of W",
    paper="PSOFT (arXiv 2505.11235)",
)
