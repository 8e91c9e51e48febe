"""PVeRA: VeRA with a normal distribution as scaling of A, whose mean is used for ΔW (arXiv 2512.07703)."""

from __future__ import annotations

from functools import partial

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="PVERA", slots="pvera_", rank=lambda shapes: shapes["pvera_lambda_d"][0] // 2),
    name="pvera",
    summary="VeRA with a distribution of updates, at its mean.",
    formula="ΔW = diag(λ_b) B diag(μ_d) A",
    paper="PVeRA (arXiv 2512.07703)",
    meaning_fields=("projection_prng_key",),
    fresh_fields=partial(fresh_fields, save_projection=False),
)
