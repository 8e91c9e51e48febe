"""PEFT: an adapter's folder, or its tensors as a single file beside its ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pimerge.adapters.format import PEFT, Content, Format, KeySummary
from pimerge.adapters.formats._keys import A_B, A_B_NAMED
from pimerge.checkpoints.safetensors_file import TensorFile


def _recognises(keys: KeySummary) -> bool:
    if any(key.startswith("base_model.") for key in keys.keys):
        return True
    return keys.has_config or (bool(keys.endings) and keys.endings <= {A_B.name, A_B_NAMED.name})


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    return Content(dict(config or {}), file)


FORMAT = Format(
    name=PEFT,
    summary="An adapter's folder of PEFT, or its tensors with its config.",
    tool="huggingface/peft, transformers, TRL, Unsloth, Axolotl, LLaMA-Factory",
    keys="base_model.model.….lora_A.weight, .lora_B.weight",
    rule="adapter_config.json: alpha / r, with rank_pattern, alpha_pattern and rsLoRA",
    naming="transformers",
    recognises=_recognises,
    read=_read,
    needs_config=True,
    ending=A_B,
    file_name="adapter_model.safetensors",
)
