"""VB-LoRA: LoRA whose factors are mixtures of vectors from one shared bank (arXiv 2405.15179)."""

from __future__ import annotations

from pimerge.adapters.keys import key_of_parameter
from pimerge.adapters.peft_kind import peft_kind
from pimerge.adapters.peft_layers import PeftDelta

_BANK = "vblora_vector_bank"


def _key_of_parameter(name: str) -> str:
    """The key of a parameter; PEFT's model holds the shared bank in the first layer.

    >>> _key_of_parameter("base_model.model.q.vblora_vector_bank.default")
    'base_model.vblora_vector_bank'
    """
    return f"base_model.{_BANK}" if f".{_BANK}." in name else key_of_parameter(name)


KIND = peft_kind(
    PeftDelta(
        peft_type="VBLORA",
        slots="vblora_",
        rank=lambda shapes: next(shape[1] for slot, shape in shapes.items() if slot.startswith("vblora_logits_B")),
        trained=(_BANK,),
    ),
    key_of_parameter=_key_of_parameter,
    name="vblora",
    summary="Low-rank updates composed of vectors from one shared bank.",
    formula="ΔW = B A, sub-vectors = Σ_k softmax(logits)_k v_k",
    paper="VB-LoRA (arXiv 2405.15179)",
)
