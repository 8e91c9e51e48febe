"""PEANuT: an update that a small network computes from W (arXiv 2410.01870)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="PEANUT",
        slots="peanut_",
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="peanut",
    slots=(*(f"peanut_{half}.{digit}" for half in ("encoders", "decoders") for digit in range(10)), "peanut_"),
    summary="An update that a small network computes from the matrix.",
    formula="ΔW = f(W)",
    paper="PEANuT (arXiv 2410.01870)",
)
