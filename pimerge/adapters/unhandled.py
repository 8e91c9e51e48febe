"""PEFT's kinds that pimerge can only inspect, and why it does not combine their tensors."""

from __future__ import annotations

from pimerge.adapters.keys import is_saved
from pimerge.adapters.kind import AdapterHeader, Parts
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot

_OF_THE_BASE = "its ΔW depends on the base's weights, which are not read when experts are combined"
_WHY = {
    "POLY": "Poly routes each task over several LoRAs",
    "XLORA": "X-LoRA routes each token over several LoRAs",
    "MIXED": "it is several adapters in one",
    "MULTITASK_PROMPT_TUNING": "its prompt is the product of a shared part and a part of each task",
    "ADAPTION_PROMPT": "LLaMA-Adapter adds gated attention over its prompts, which is not an update of a weight",
    "ADAMSS": _OF_THE_BASE,
    "FROD": _OF_THE_BASE,
    "GLORA": _OF_THE_BASE,
    "TINYLORA": _OF_THE_BASE,
    "LILY": "Lily shares factors between layers and routes each token over several",
    "ROAD": "RoAd rotates and scales pairs of a layer's outputs, and the sum of two rotations is not a rotation",
    "BEFT": "BEFT adds trained vectors to the outputs of some layers, which PEFT merges only into layers with a bias",
    "CPT": "CPT trains its prompt around the tokens of its own examples, so two prompts have no common form",
    "CARTRIDGE": "a cartridge is a cache of the keys and values of a text, and two texts cannot be summed",
    "SHADOW": "it is a separate network beside the base",
}
_MERGED_BY_PEFT = frozenset({"ADAMSS", "BEFT", "FROD", "GLORA", "ROAD", "TINYLORA"})
NO_RULE = "this version of pimerge does not know its tensors"
"""The reason for a kind that is newer than this version of pimerge."""
_PREFIXES = ("base_model.model.", "base_model.")


def why_unhandled(peft_type: str) -> str:
    """Why experts of a type are not combined; empty for a type that PEFT does not know either.

    >>> why_unhandled("POLY")
    'Poly routes each task over several LoRAs'
    """
    if peft_type in _WHY:
        return _WHY[peft_type]
    from peft import PeftType

    return NO_RULE if peft_type in PeftType.__members__ else ""


def what_to_do(peft_type: str) -> str:
    """What can be done with an expert of a type that is not combined.

    >>> what_to_do("POLY")
    'leave it out: PEFT cannot merge it into its base either'
    """
    if peft_type in _MERGED_BY_PEFT:
        return (
            "merge each into its base with PEFT (merge_and_unload, then save_pretrained(FOLDER)), and then the "
            "checkpoints: pimerge merge FOLDER FOLDER --base BASE; or make a LoRA of each: pimerge extract FOLDER "
            "--base BASE"
        )
    if peft_type not in _WHY:
        return "install a newer pimerge, or merge it into its base with PEFT (merge_and_unload) if PEFT can"
    return "leave it out: PEFT cannot merge it into its base either"


def parse(header: AdapterHeader) -> Parts:
    """Group every tensor outside the head by the module in its name."""
    saved = header.config.get("modules_to_save")
    heads = saved if isinstance(saved, list) else []
    found: dict[str, dict[str, TensorSlot]] = {}
    head = {}
    for key, shape in sorted(header.shapes.items()):
        name = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
        if is_saved(name, heads):
            head[name] = key
        else:
            module, _, slot = name.rpartition(".")
            found.setdefault(module or slot, {})[slot] = TensorSlot(key, shape)
    return {name: TensorSet(name, slots) for name, slots in found.items()}, head
