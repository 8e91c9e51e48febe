"""MiSS: one block of rows, repeated across the inputs of a layer (arXiv 2409.15371)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pimerge.adapters.peft_kind import fresh_fields, peft_kind
from pimerge.adapters.peft_layers import PeftDelta

if TYPE_CHECKING:
    from torch import Tensor


def _delta(layer: Any, weight: Tensor) -> Tensor:
    """ΔW; except for the variant "bat", PEFT returns W + ΔW, and it changes its argument in place."""
    weight = weight.double()
    if layer.miss_fn == "bat":
        delta: Tensor = layer.get_delta_weight("default", weight.clone())
        return delta
    whole: Tensor = layer.get_delta_weight_miss("default", weight.clone())
    return whole - weight


KIND = peft_kind(
    PeftDelta(
        peft_type="MISS", slots="miss_", delta=_delta, needs_weight=lambda config: config.get("init_weights") == "bat"
    ),
    name="miss",
    summary="One block, repeated over the inputs of a layer.",
    formula="ΔW = [Dᵀ Dᵀ …], or with 'bat' W D + D block by block",
    paper="MiSS (arXiv 2409.15371)",
    fresh_fields=fresh_fields,
)
