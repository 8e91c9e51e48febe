"""DeLoRA: updates whose norm is trained separately from their direction (arXiv 2503.18225)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="DELORA", slots="delora_", fixed=("delora_w_norm",), rank=lambda shapes: shapes["delora_A"][0]),
    name="delora",
    summary="Updates whose norm is trained separately from their direction.",
    formula="ΔW = λ/r · Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag ‖w_j‖",
    paper="DeLoRA (arXiv 2503.18225)",
    init_slots=("delora_A",),
)
