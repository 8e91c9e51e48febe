"""LyCORIS: LoHa, LoKr, LoCon with a core, full updates and norms, mixed with LoRA in one file.

LoHa is scaled by alpha / dim. LoKr is scaled by alpha / dim as well, unless both of its matrices are whole: then by 1
(``LokrModule.__init__`` in ``lycoris/modules/lokr.py``). A full update (``diff``), a norm (``w_norm``) and a bias
(``diff_b``, ``b_norm``) are not scaled. A merge writes a LoHa as a LoHa whose second product is all ones, and a LoKr as
a LoKr whose first matrix is 1, which is exact for any update.
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

_OWN = {*HADAMARD, *KRONECKER, *WHOLE}


def _recognises(keys: KeySummary) -> bool:
    if any(key.startswith(("base_model.", "diffusion_model.")) for key in keys.keys):
        return False
    flat = any(key.startswith(("lora_", "lycoris_")) for key in keys.keys)
    if keys.has_config and not flat:  # LoHa or LoKr of PEFT
        return False
    return bool(keys.slots & _OWN) or any(key.startswith("lycoris_") for key in keys.keys)


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    return read_modules(file, ModuleReading(DOWN_UP))


def _metadata(writing: ForWriting) -> dict[str, str]:
    return kohya_metadata(writing, "lycoris.kohya", {"algo": "lora"})


FORMAT = Format(
    name="lycoris",
    summary="LoHa, LoKr, LoCon and full updates of LyCORIS.",
    tool="KohakuBlueleaf/LyCORIS, SimpleTuner, kohya-ss/sd-scripts",
    keys="lora_unet_….hada_w1_a, .lokr_w1, .lora_mid.weight, .diff, .w_norm",
    rule="alpha / dim; LoKr of two whole matrices and full updates 1",
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
