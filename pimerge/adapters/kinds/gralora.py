"""GraLoRA: a low-rank update for each block of W (arXiv 2505.20355)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="GRALORA", slots="gralora_"),
    name="gralora",
    summary="A low-rank update for each block of a matrix.",
    formula="ΔW_ij = s · B_ij A_ij for each block ij",
    paper="GraLoRA (arXiv 2505.20355)",
    fresh_fields=fresh_fields,
)
