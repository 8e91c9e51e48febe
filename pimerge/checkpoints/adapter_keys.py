"""Keys that only the tensors of an adapter have, in any tool's file format.

Factors such as ``lora_A`` and ``lora_B`` are not weights: averaging them one by one is not averaging the updates. So a
file with such keys is never taken for a plain state dict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pimerge.checkpoints.safetensors_file import open_tensors
from pimerge.core.errors import PimergeError

_ADAPTER_KEY = re.compile(
    r"(^|\.)lora_(embedding_)?[AaBb](\.|$)"  # PEFT, diffusers, MLX
    r"|\.lora_(down|up|mid)(\.|$)"  # kohya
    r"|[._]lora\d*\.(down|up)\.|\.lora_linear_layer\.(down|up)\."  # older diffusers
    r"|\.(hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t[12])|oft_(blocks|diag)|dora_scale)(\.|$)"  # LyCORIS
    r"|\.lora_magnitude_vector(\.|$)"
    r"|^lora_[a-z0-9]+_|^lycoris_"  # the names of all modules in files of kohya and LyCORIS
)


def adapter_keys(keys: Iterable[str]) -> list[str]:
    """The keys among others that belong to an adapter.

    >>> adapter_keys(["model.norm.weight", "unet.q.lora_A.weight", "lora_unet_q.alpha", "attn.w_lora.lora.0.weight"])
    ['unet.q.lora_A.weight', 'lora_unet_q.alpha']
    """
    return [key for key in keys if _ADAPTER_KEY.search(key)]


def is_adapter_file(path: str | Path) -> bool:
    """Whether a path is a safetensors file with the tensors of an adapter.

    >>> is_adapter_file("no/such.safetensors")
    False
    """
    if not (str(path).endswith(".safetensors") and os.path.isfile(path)):
        return False
    try:
        return bool(adapter_keys(open_tensors(Path(path)).entries))
    except PimergeError:  # a damaged file is reported when it is opened
        return False
