"""RandLoRA: sums of scaled random low-rank updates that all layers share (arXiv 2502.00987)."""

from __future__ import annotations

from functools import partial

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="RANDLORA", slots="randlora_"),
    name="randlora",
    summary="Sums of scaled random low-rank updates that all layers share.",
    formula="ΔW = s · Σ_n B_n diag(λ_n) A diag(γ_n), s = alpha / r",
    paper="RandLoRA (arXiv 2502.00987)",
    meaning_fields=("projection_prng_key", "sparse", "very_sparse"),
    fresh_fields=partial(fresh_fields, save_projection=False),
)
