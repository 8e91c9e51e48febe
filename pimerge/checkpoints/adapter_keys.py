"""Keys that only the tensors of an adapter have, in any tool's file format.

Factors such as ``lora_A`` and ``lora_B`` are not weights: averaging them one by one is not averaging the updates. So a
file with such keys is never taken for a plain state dict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
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
    r"|^base_model\.(.+\.)?(adamss|beft|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|ia3|lily|miss|oft|osf"
    r"|peanut|poly|psoft|p?vera|randlora|road|shira|supertuning|tinylora|unilora|vblora|waveft|xlora)_"  # PEFT's kinds
    r"|^(unet|text_encoder\w*|vae):\d+:(up|down)$"  # cloneofsimo
    r"|\.adapter(_layer(\.\w+)?)?\.linear_(in|out)\."  # NeMo, Megatron Bridge
    r"|(^|\.)(lora_?module|lora_?layer|lora\d*|lora_linear)([._]\w+)?[._](A|B|a|b|up|down)(\.weight)?$"
    r"|^lora_controlnet$"  # Control-LoRA
)
_PAIRS = {"a": "b", "A": "B", "down": "up"}  # parts of the names of two factors
_PART = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(_PAIRS)})(?![A-Za-z0-9])")


def adapter_keys(keys: Iterable[str]) -> list[str]:
    """The keys among others that belong to an adapter.

    >>> adapter_keys(["model.norm.weight", "unet.q.lora_A.weight", "lora_unet_q.alpha", "attn.w_lora.lora.0.weight"])
    ['unet.q.lora_A.weight', 'lora_unet_q.alpha']
    """
    return [key for key in keys if _ADAPTER_KEY.search(key)]


def factor_keys(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The keys of a file's matrices if they are nothing but pairs of factors, by their names and shapes.

    A factor A is (r, d_in) and B is (d_out, r), with r below both; their names differ in one part, such as ``a`` and
    ``b``. The weights of a whole model are never only such pairs.

    >>> factor_keys({"w_a_000": (2, 16), "w_b_000": (16, 2), "q.A": (2, 8), "q.B": (6, 2), "q.alpha": ()})
    ['q.A', 'q.B', 'w_a_000', 'w_b_000']
    >>> factor_keys({"embed": (9, 8), "q.A": (2, 8), "q.B": (6, 2)})
    []
    """
    matrices = {key for key, shape in shapes.items() if len(shape) > 1}
    paired: set[str] = set()
    for key in matrices:
        for match in _PART.finditer(key):
            other = f"{key[: match.start()]}{_PAIRS[match[1]]}{key[match.end() :]}"
            a, b = shapes[key], shapes.get(other, ())
            if len(b) > 1 and a[0] == b[1] and a[0] < min(a[1], b[0]):
                paired |= {key, other}
    is_biased = any(len(shape) == 1 and shape[0] > 1 for shape in shapes.values())  # of layers of their own
    return sorted(paired) if paired and paired == matrices and not is_biased else []


def is_adapter_file(path: str | Path) -> bool:
    """Whether a path is a safetensors file with the tensors of an adapter.

    >>> is_adapter_file("no/such.safetensors")
    False
    """
    if not (str(path).endswith(".safetensors") and os.path.isfile(path)):
        return False
    try:
        entries = open_tensors(Path(path)).entries
        return bool(adapter_keys(entries) or factor_keys({key: entry.shape for key, entry in entries.items()}))
    except PimergeError:  # a damaged file is reported when it is opened
        return False
