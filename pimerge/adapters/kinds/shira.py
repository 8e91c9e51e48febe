"""SHiRA: selected entries of W (arXiv 2406.13175)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="SHIRA", slots="shira_", fixed=("shira_indices",)),
    name="shira",
    summary="Selected entries of a matrix.",
    formula="ΔW = Σ_i v_i e_{p_i} e_{q_i}ᵀ",
    paper="SHiRA (arXiv 2406.13175)",
    meaning_fields=("random_seed", "mask_type"),
)
