"""AdaLoRA: updates in the form of an SVD, pruned during training (arXiv 2303.10512)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="ADALORA", slots="lora_", rank=lambda shapes: shapes["lora_A"][0]),
    name="adalora",
    summary="Low-rank updates in the form of an SVD, pruned during training.",
    formula="ΔW = s · B diag(E) A",
    paper="AdaLoRA (arXiv 2303.10512)",
    init_slots=("lora_A",),
)
