"""Uni-LoRA: LoRA whose numbers are all taken from one shared vector (arXiv 2506.00799)."""

from __future__ import annotations

from pimerge.adapters.kind import Shapes
from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta
from pimerge.core.errors import PimergeError


def _weight(shapes: Shapes) -> tuple[int, ...]:
    return shapes["unilora_indices_B"][0], shapes["unilora_indices_A"][1]


def _require_indices(shapes: Shapes) -> None:
    if not any(key.endswith(".unilora_indices_A") for key in shapes):
        raise PimergeError(
            "its file does not say which numbers each layer takes (save_indices is off)",
            "load it with PEFT, set save_indices=True in its config, and save it again",
        )


KIND = peft_kind(
    PeftDelta(
        peft_type="UNILORA",
        slots="unilora_",
        rank=lambda shapes: shapes["unilora_indices_A"][0],
        weight=_weight,
        fixed=("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
        trained=("unilora_theta_d",),
        require=_require_indices,
        since="0.21",
    ),
    name="unilora",
    summary="Low-rank updates whose numbers are all taken from one shared vector.",
    formula="ΔW = B A, A = θ[i_A] ⊙ s_A, B = θ[i_B] ⊙ s_B",
    paper="Uni-LoRA (arXiv 2506.00799)",
)
