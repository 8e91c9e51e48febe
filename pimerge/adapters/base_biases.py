"""Check the biases of the base that PEFT saves with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pimerge.adapters.keys import base_biases
from pimerge.adapters.saved_embeddings import is_equal, keys_of
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import PimergeError


def require_untrained_biases(config: Mapping[str, Any], file: TensorFile, base: Callable[[], Base]) -> None:
    """Refuse an adapter with biases that differ from the base's, since a LoRA cannot hold them.

    Args:
        base: gives the base; called only if there are such biases.
    """
    biases = base_biases(config, file.entries)
    if not biases:
        return
    what = f"it holds {len(biases)} biases of the base's layers, such as {next(iter(biases))}"
    hint = (
        "train with bias='none' (lora_bias=True is accepted), or merge the adapter into its base with PEFT; if the "
        "biases were not trained, set bias to 'none' in adapter_config.json and remove them from the file"
    )
    if (folder := base().folder) is None:
        raise PimergeError(
            f"{what}: {base().label} is not on this machine, so nothing tells whether they were trained",
            f"download it first (hf download NAME), or pass --base with its folder; or {hint}",
        )
    checkpoint = open_checkpoint(folder)
    keys = keys_of(checkpoint, list(biases.values()))
    changed = [key for key, name in biases.items() if not is_equal(checkpoint, keys.get(name), file.read(key))]
    if changed:
        raise PimergeError(
            f"{what}, and {len(changed)} of them were trained, such as {changed[0]}: a trained bias is not a low-rank "
            "update of a matrix",
            hint,
        )
