"""ai-toolkit and ComfyUI: names of the original model under ``diffusion_model.``.

ai-toolkit saves its LoRA with alpha equal to the rank and leaves alpha out, so the scaling is 1; a file that states an
alpha is scaled by alpha / rank, as ComfyUI does (``LoRAAdapter.calculate_weight`` in ``comfy/weight_adapter/lora.py``).
LoKr follows LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pimerge.adapters.format import Content, Format, ForWriting, KeySummary
from pimerge.adapters.formats._flat_names import dotted_name, flat
from pimerge.adapters.formats._keys import A_B
from pimerge.adapters.formats._metadata import base_of, carried
from pimerge.adapters.formats._modules import ModuleReading, read_modules
from pimerge.checkpoints.safetensors_file import TensorFile

_PREFIXES = ("diffusion_model.", "model.diffusion_model.")


def _recognises(keys: KeySummary) -> bool:
    return any(key.startswith(_PREFIXES) for key in keys.keys)


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    return read_modules(file, ModuleReading(A_B))


def _metadata(writing: ForWriting) -> dict[str, str]:
    return carried(writing.metadata)


FORMAT = Format(
    name="ai-toolkit",
    summary="LoRA and LoKr under diffusion_model., as ai-toolkit and ComfyUI write them.",
    tool="ostris/ai-toolkit, ComfyUI, musubi-tuner's converter",
    keys="diffusion_model.….lora_A.weight, .lora_B.weight, .alpha, .lokr_w1",
    rule="1; with alpha in the file, alpha / rank",
    naming="ai-toolkit",
    flat=flat,
    named=dotted_name,
    holds_products=True,
    recognises=_recognises,
    read=_read,
    ending=A_B,
    metadata=_metadata,
    base=base_of,
)
