"""How a checkpoint stores the weights that an adapter updates: under which keys, and which way round."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pimerge.adapters.lora_module import LoraModule
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import Names, is_fan_in_first, match
from pimerge.core.errors import PimergeError


def keys_as_stored(checkpoint: Checkpoint, layouts: Mapping[str, LoraModule]) -> dict[str, str] | None:
    """Key → module, if the tensors on disk are enough to tell; None if the model's architecture is needed.

    Building the model's skeleton takes seconds. It is not needed if every module's weight is stored under its own
    name, is certainly (d_out × d_in) (a square one may be a Conv1D's, but those have a bias), cannot be tied to
    another, and has no bias update.
    """
    texts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    vocabulary = {part.get("vocab_size") for part in texts}
    found = {}
    for name, layout in layouts.items():
        key = f"{name}.weight"
        if key not in checkpoint.home or layout.layer != "linear" or layout.bias or layout.d_out in vocabulary:
            return None
        is_square = layout.d_out == layout.d_in
        if checkpoint.entry(key).shape != (layout.d_out, layout.d_in) or (
            is_square and f"{name}.bias" in checkpoint.home
        ):
            return None
        found[key] = name
    return found


def is_transposed(
    key: str, dtype: str, shape: tuple[int, ...], layout: LoraModule, fan_in_fan_out: bool, names: Names
) -> bool:
    """Whether a weight of this dtype and shape is (d_in × d_out); a weight that does not fit the update is refused.

    Args:
        fan_in_fan_out: the field of the adapter's config; it decides for a square weight where the model is unknown.
    """
    if dtype not in FLOATS:
        raise PimergeError(f"'{key}' is stored as {dtype}", f"expected {', '.join(FLOATS)}")
    stored = (shape[0] if shape else 0, math.prod(shape[1:]))
    plain, turned = (layout.d_out, layout.d_in), (layout.d_in, layout.d_out)
    if stored not in ((turned,) if layout.layer == "embedding" else (plain, turned)) or len(shape) < 2:
        raise PimergeError(
            f"module '{layout.name}': ΔW is {plain}, '{key}' is {shape}", "the adapter was trained on another base"
        )
    if layout.layer == "embedding" or plain != turned:
        return stored == turned
    if names.known:
        return is_fan_in_first(names, layout.name)
    return fan_in_fan_out


def bias_of(names: Names, module: str) -> str:
    """The key of a module's bias; a module without one is refused."""
    try:
        return match(names, f"{module}.bias", f"the bias of module '{module}'")
    except PimergeError as error:
        raise PimergeError(
            f"module '{module}' has a bias update (lora_bias), but its layer in the checkpoint has no bias",
            "merge into an adapter instead, or train without lora_bias",
        ) from error
