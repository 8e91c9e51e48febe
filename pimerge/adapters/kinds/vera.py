"""VeRA: vectors that scale random projections which all layers share (arXiv 2310.11454)."""

from __future__ import annotations

from functools import partial

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="VERA", slots="vera_", rank=lambda shapes: shapes["vera_lambda_d"][0]),
    name="vera",
    summary="Vectors that scale random projections which all layers share.",
    formula="ΔW = diag(λ_b) B diag(λ_d) A",
    paper="VeRA (arXiv 2310.11454)",
    meaning_fields=("projection_prng_key",),
    fresh_fields=partial(fresh_fields, save_projection=False),
)
