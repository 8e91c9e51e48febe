"""VB-LoRA: LoRA whose factors are mixtures of vectors from one shared bank (arXiv 2405.15179)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="VBLORA",
        slots="vblora_",
        rank=lambda shapes: next(shape[1] for slot, shape in shapes.items() if slot.startswith("vblora_logits_B")),
        trained=("vblora_vector_bank",),
    ),
    name="vblora",
    summary="Low-rank updates composed of vectors from one shared bank.",
    formula="ΔW = B A, sub-vectors = Σ_k softmax(logits)_k v_k",
    paper="VB-LoRA (arXiv 2405.15179)",
)
