"""FourierFT: a few frequencies of ΔW's two-dimensional Fourier transform (arXiv 2405.03003)."""

from __future__ import annotations

from functools import partial

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="FOURIERFT", slots="fourierft_", rank=lambda shapes: 2 * shapes["fourierft_spectrum"][0]),
    name="fourierft",
    summary="A few frequencies of ΔW's two-dimensional Fourier transform.",
    formula="ΔW_jk = s/(mn) · Σ_i c_i cos 2π(p_i j/m + q_i k/n)",
    paper="FourierFT (arXiv 2405.03003)",
    meaning_fields=("random_loc_seed",),
    fresh_fields=partial(fresh_fields, name="n_frequency"),
)
