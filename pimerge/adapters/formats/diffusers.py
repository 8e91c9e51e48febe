"""diffusers: LoRA of a pipeline's parts, ``unet.``, ``transformer.`` and ``text_encoder.``, of all its eras.

Today's keys are those of PEFT after the part's name (``unet.….lora_A.weight``); before, attention processors had
``….processor.to_q_lora.down.weight`` and text encoders ``….lora_linear_layer.down.weight``. diffusers maps old names of
modules to today's (``convert_unet_state_dict_to_peft``), and so they match here.

The metadata ``lora_adapter_metadata`` states r, alpha and patterns of each part (``save_lora_weights``). Without it and
without alphas in the file, alpha is the rank (``get_peft_kwargs``). A merged file has one rank in each part, since
diffusers takes one alpha for all modules of a part if the file states none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.format import Content, Format, ForWriting, KeySummary
from pimerge.adapters.formats._flat_names import dotted_name, flat
from pimerge.adapters.formats._keys import (
    A_B,
    ATTENTION_PROCESSOR,
    DOWN_UP,
    LINEAR_LAYER,
    LORA_LAYER,
    NUMBERED,
    TRANSPOSED,
)
from pimerge.adapters.formats._metadata import base_of, carried
from pimerge.adapters.formats._modules import ModuleReading, read_modules
from pimerge.adapters.lora_module import pattern_value
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import PimergeError

METADATA = "lora_adapter_metadata"
_OTHERS = ("base_model.", "diffusion_model.", "lora_", "lycoris_")
_PART = re.compile(r"(unet|transformer(_2)?|text_encoder(_\d)?|prior|decoder|vae|controlnet)\.(?!h\.\d)")  # not GPT-2's
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")
_TRANSFORMER = re.compile(r"(single_)?transformer_blocks\.")
_LOADING = """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base})
pipeline.load_lora_weights("path/to/this/folder", weight_name={file})
"""
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _recognises(keys: KeySummary) -> bool:
    if not keys.endings or any(key.startswith(_OTHERS) for key in keys.keys):
        return False
    if keys.endings & {LORA_LAYER.name, ATTENTION_PROCESSOR.name, LINEAR_LAYER.name, NUMBERED.name}:
        return True
    if keys.has_config or TRANSPOSED.name in keys.endings:
        return False
    named = all(_PART.match(stem) or _UNET.match(stem) or _TRANSFORMER.match(stem) for stem in keys.stems)
    return named or ("alpha" in keys.slots and DOWN_UP.name not in keys.endings)


def _name(stem: str) -> str:
    """Today's name of a module.

    >>> _name("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    name = stem.replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if name.startswith("text_encoder"):
        return f"{parent}.{_OLD_TEXT.get(last, last)}"
    name = f"{name}.0" if last == "to_out" else name
    if _UNET.match(name):
        return f"unet.{name}"
    return f"transformer.{name}" if _TRANSFORMER.match(name) else name


def _part(name: str) -> str:
    return name.partition(".")[0]


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    try:
        stated = json.loads(file.metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise PimergeError(f"its metadata {METADATA} is not valid JSON ({error})", "save the file again") from error

    def alpha(name: str, rank: int) -> float:
        part, _, module = name.partition(".")
        usual = stated.get(f"{part}.lora_alpha", rank)
        given = float(pattern_value(stated.get(f"{part}.alpha_pattern") or {}, module, usual))
        return given * math.sqrt(rank) if stated.get(f"{part}.use_rslora") else given

    return read_modules(file, ModuleReading(A_B, alpha, _name))


def _metadata(writing: ForWriting) -> dict[str, str]:
    """What all sources share; r, alpha and modules of each part if a source states them."""
    stated = next((json.loads(each[METADATA]) for each in writing.metadata if METADATA in each), None)
    known = {name: text for name, text in carried(writing.metadata).items() if name != METADATA}
    if stated is None:
        return known
    parts: dict[str, list[str]] = {}
    for name in writing.ranks:
        parts.setdefault(_part(name), []).append(name)
    for part, names in parts.items():
        ranks, alphas = ({name: values[name] for name in names} for values in (writing.ranks, writing.alphas))
        fields: dict[str, Any] = {
            "r": max(ranks.values()),
            "lora_alpha": max(alphas.values()),
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "target_modules": sorted(name.partition(".")[2] for name in names),
        }
        stated |= {f"{part}.{field}": value for field, value in fields.items()}
    return {**known, METADATA: json.dumps(stated, indent=2, sort_keys=True)}


FORMAT = Format(
    name="diffusers",
    summary="LoRA of the parts of a diffusers pipeline.",
    tool="huggingface/diffusers",
    keys="unet.….lora_A.weight, transformer.…, text_encoder.…; older: .lora.down.weight, .to_q_lora.down.weight",
    rule="alpha / r by lora_adapter_metadata or alpha in the file, otherwise 1",
    naming="diffusers",
    flat=flat,
    named=dotted_name,
    recognises=_recognises,
    read=_read,
    ending=A_B,
    one_rank=True,
    one_era=True,
    group=_part,
    metadata=_metadata,
    loading=_LOADING,
    base=base_of,
)
