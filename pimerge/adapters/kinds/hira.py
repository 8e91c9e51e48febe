"""HiRA: Hadamard product of W with a low-rank matrix (ICLR 2025); needs the base's weights."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="HIRA",
        slots="hira_",
        delta=lambda layer, weight: layer.get_delta_weight("default") * weight,
        needs_weight=lambda config: True,
        since="0.20",
    ),
    name="hira",
    summary="The Hadamard product of W with a low-rank matrix.",
    formula="ΔW = W ⊙ (B A)",
    paper="HiRA (ICLR 2025)",
    init_slots=("hira_A",),
)
