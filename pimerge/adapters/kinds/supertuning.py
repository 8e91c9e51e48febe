"""Super-Tuning: the largest entries of W, and optionally a LoRA (arXiv 2607.09287)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="SUPERTUNING",
        slots="supertuning_",
        fixed=("supertuning_indices",),
        needs_weight=lambda config: not config.get("save_precomputed_indices"),
        on_weight=True,
        since="0.21",
    ),
    name="supertuning",
    summary="The largest or smallest entries of a matrix, and optionally a LoRA.",
    formula="ΔW = Σ_i v_i e_{p_i} e_{q_i}ᵀ + s · B A",
    paper="Super-Tuning (arXiv 2607.09287)",
)
