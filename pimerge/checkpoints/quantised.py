"""Recognise checkpoints whose weights are quantised, and refuse them with what helps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pimerge.checkpoints.dtypes import FLOATS
from pimerge.core.errors import PimergeError

BITSANDBYTES = "bitsandbytes"
_CONFIGS = ("quantization_config", "compression_config")
_COMPANIONS = (
    "qweight",
    "qzeros",
    "absmax",
    "SCB",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "scale_weight",
    "weight_scale_2",
    "weight_scales",
    "W_q",
    "_data",
    "codebooks",
)
_PACKED = ("_blocks", "_scales")  # of fused experts in MXFP4
_BASE_MODEL = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.\-]+/[\w.\-]+)", re.MULTILINE)


def refuse_quantised(path: Path, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Refuse a checkpoint with quantised weights, to which no update can be added.

    Args:
        dtypes: key → safetensors' name of the dtype of each tensor.
    """
    shown = [f"{name} in config.json" for name, _ in _stated(config)]
    shown += [f"{key} ({dtype})" for key, dtype in dtypes.items() if _is_quantised(key, dtype)]
    if not shown:
        return
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    original = _original(path, config)
    hint = f"use the unquantised original in F32, BF16 or F16{f', {original}' * bool(original)}"
    if method_of(config, dtypes) == BITSANDBYTES:
        hint += "; or merge an adapter into the dequantised weights, with --into and --dequantize"
    raise PimergeError(f"the checkpoint '{path}' is quantised: {', '.join(shown[:4])}{more}", hint)


def method_of(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> str:
    """The method by which a checkpoint was quantised; empty if it is not known.

    >>> method_of({"quantization_config": {"quant_method": "gptq"}}, {}), method_of({}, {"q.SCB": "F32"})
    ('gptq', 'bitsandbytes')
    """
    stated: Mapping[str, Any] = next((value for _, value in _stated(config) if isinstance(value, dict)), {})
    if stated.get("quant_method"):
        return str(stated["quant_method"])
    return BITSANDBYTES if any(".quant_state." in key or key.endswith(".SCB") for key in dtypes) else ""


def _stated(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a config says of quantisation, for the model or for a part of it such as ``text_config``: name → value."""
    found = [(name, config[name]) for name in _CONFIGS if config.get(name)]
    parts = {part: value for part, value in config.items() if isinstance(value, dict)}
    return found + [(f"{part}.{name}", value) for part, own in parts.items() for name, value in _stated(own)]


def _is_quantised(key: str, dtype: str) -> bool:
    is_companion = key.rpartition(".")[2] in _COMPANIONS or ".quant_state." in key
    is_packed = dtype == "U8" and key.endswith(_PACKED)
    return (
        is_companion
        or is_packed
        or dtype.startswith(("F8_", "F6_", "F4"))
        or (key.endswith(".weight") and dtype not in FLOATS)
    )


def _original(path: Path, config: Mapping[str, Any]) -> str:
    """The model that was quantised, as the config or the model card states it; empty if neither does."""
    stated = str(config.get("_name_or_path") or "")
    card = path / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
        found = _BASE_MODEL.search(head)
        stated = found[1] if found else stated
    return "" if not stated or Path(stated).name == path.name else f"'{stated}'"
