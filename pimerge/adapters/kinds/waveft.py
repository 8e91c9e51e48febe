"""WaveFT: a few entries of ΔW's wavelet transform (arXiv 2505.12532)."""

from __future__ import annotations

from functools import partial

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(peft_type="WAVEFT", slots="waveft_"),
    name="waveft",
    summary="A few coefficients of ΔW's wavelet transform.",
    formula="ΔW = s · W⁻¹(c)",
    paper="WaveFT (arXiv 2505.12532)",
    meaning_fields=("random_loc_seed", "wavelet_family", "use_idwt"),
    fresh_fields=partial(fresh_fields, name="n_frequency"),
)
