"""OSF: the small singular directions of W are trained (arXiv 2504.07097)."""

from __future__ import annotations

from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

KIND = peft_kind(
    PeftDelta(
        peft_type="OSF",
        slots="osf_",
        needs_weight=lambda config: True,
        on_weight=True,
    ),
    name="osf",
    slots=("osf_svd_params.U_", "osf_svd_params.S_", "osf_svd_params.V_"),
    summary="The small singular directions of a matrix are trained.",
    formula="ΔW = U diag(s) V − W, the large singular values of W kept",
    paper="OSF (arXiv 2504.07097)",
)
