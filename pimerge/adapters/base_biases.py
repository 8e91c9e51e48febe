"""The biases of the base that PEFT saves with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pimerge.adapters.keys import base_biases
from pimerge.adapters.saved_embeddings import is_equal, keys_of
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.checkpoints.safetensors_file import TensorFile


def trained_biases(config: Mapping[str, Any], file: TensorFile, base: Callable[[], Base]) -> dict[str, str]:
    """Parameter of the base → key, for the biases that differ from the base's; all if the base is not on this machine.

    Args:
        base: gives the base; called only if there are such biases.
    """
    biases = base_biases(config, file.entries)
    if not biases or (folder := base().folder) is None:
        return {name: key for key, name in biases.items()}
    checkpoint = open_checkpoint(folder)
    keys = keys_of(checkpoint, list(biases.values()))
    return {name: key for key, name in biases.items() if not is_equal(checkpoint, keys.get(name), file.read(key))}
