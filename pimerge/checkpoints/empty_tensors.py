"""Recognise files that were saved without the weights themselves, and say how to save them."""

from __future__ import annotations

from collections.abc import Mapping

from pimerge.core.errors import PimergeError


def refuse_empty(shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse tensors that hold no numbers, such as DeepSpeed ZeRO-3 leaves in place of its parameters.

    Args:
        what: the subject of the message.
    """
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        raise PimergeError(
            f"{len(empty)} of {len(shapes)} tensors of {what} are empty, such as {empty[0]} {shapes[empty[0]]}: it was "
            "saved under DeepSpeed ZeRO-3 or FSDP without gathering the parameters, so its weights are not in the file",
            "save it with trainer.save_model() and stage3_gather_16bit_weights_on_model_save, or gather the parameters "
            "first (deepspeed.zero.GatheredParameters); a checkpoint folder of ZeRO-3 has zero_to_fp32.py for this",
        )
