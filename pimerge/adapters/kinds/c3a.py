"""C3A: blocks that are circulant matrices (arXiv 2407.19342)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="C3A", slots="c3a_"),
    name="c3a",
    summary="Circular convolutions, block by block.",
    formula="ΔW_ij = circulant(k_ij)",
    paper="C3A (arXiv 2407.19342)",
)
