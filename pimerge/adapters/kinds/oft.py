"""OFT: an orthogonal matrix for the inputs of W (arXiv 2306.07280); ΔW is relative to the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta, merged_delta

KIND = peft_kind(
    PeftDelta(
        peft_type="OFT",
        slots="oft_",
        delta=merged_delta,
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="oft",
    summary="An orthogonal matrix that rotates the inputs of a layer.",
    formula="ΔW = W R − W, R block-diagonal and orthogonal",
    paper="OFT (arXiv 2306.07280)",
)
