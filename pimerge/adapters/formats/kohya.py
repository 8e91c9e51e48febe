"""kohya's sd-scripts: LoRA with flattened names of modules, such as ``lora_unet_mid_block_attentions_0_proj_in``.

A module is scaled by alpha / dim, with alpha in the file; without one, alpha is dim (``LoRAModule.__init__`` and
``create_network_from_weights`` in ``networks/lora.py``). Files with the same endings and other names, such as those of
musubi-tuner and some Flux and Qwen-Image LoRAs, follow the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pimerge.adapters.format import Content, Format, ForWriting, KeySummary
from pimerge.adapters.formats._flat_names import flat, kohya_name
from pimerge.adapters.formats._keys import DOWN_UP, HADAMARD, KRONECKER, WHOLE
from pimerge.adapters.formats._metadata import base_of, kohya_metadata, part_of_model
from pimerge.adapters.formats._modules import ModuleReading, read_modules
from pimerge.checkpoints.safetensors_file import TensorFile

_LYCORIS = {*HADAMARD, *KRONECKER, *WHOLE}


def _recognises(keys: KeySummary) -> bool:
    if keys.slots & _LYCORIS or any(key.startswith(("lycoris_", "diffusion_model.")) for key in keys.keys):
        return False
    return all(key.startswith("lora_") for key in keys.keys) or keys.endings == {DOWN_UP.name}


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    return read_modules(file, ModuleReading(DOWN_UP))


def _metadata(writing: ForWriting) -> dict[str, str]:
    return kohya_metadata(writing, "networks.lora", {})


FORMAT = Format(
    name="kohya",
    summary="LoRA of kohya's sd-scripts and of tools that follow it.",
    tool="kohya-ss/sd-scripts, musubi-tuner, OneTrainer",
    keys="lora_unet_….lora_down.weight, .lora_up.weight, .alpha",
    rule="alpha / dim; without alpha 1",
    naming="kohya",
    flat=flat,
    named=kohya_name,
    holds_products=True,
    recognises=_recognises,
    read=_read,
    ending=DOWN_UP,
    writes_alpha=True,
    group=part_of_model,
    metadata=_metadata,
    base=base_of,
)
