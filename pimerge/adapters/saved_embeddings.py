"""Embeddings of the base that PEFT saves beside an adapter, and loads over the base's.

If they are the base's own, the adapter means the same without them. If they were trained or resized, they are part of
the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pimerge.adapters.keys import is_saved, parameter_of
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor


def without_copies(
    head: Mapping[str, str], modules_to_save: Sequence[str], base: Callable[[], Base], read: Callable[[str], Tensor]
) -> dict[str, str]:
    """An adapter's head without the embeddings that are copies of the base's.

    All are kept if the base is not on this machine.

    Args:
        head: parameter name → key.
        base: gives the base; called only if there are such embeddings.
        read: reads the adapter's tensor of a key.
    """
    saved = {name: key for name, key in head.items() if not is_saved(name, modules_to_save)}
    if not saved or (folder := base().folder) is None:
        return dict(head)
    checkpoint = open_checkpoint(folder)
    own = keys_of(checkpoint, [parameter_of(name) for name in saved])
    copies = {name for name, key in saved.items() if is_equal(checkpoint, own.get(parameter_of(name)), read(key))}
    return {name: key for name, key in head.items() if name not in copies}


def keys_of(checkpoint: Checkpoint, parameters: Sequence[str]) -> dict[str, str]:
    """Parameter → key in the checkpoint; the model's architecture is built only if a key has another name."""
    if checkpoint.home.keys() >= set(parameters):
        return {parameter: parameter for parameter in parameters}
    from pimerge.checkpoints.key_mapping import match, names_at  # imports torch and, when used, transformers

    names, found = names_at(checkpoint.path), {}
    for parameter in parameters:
        with suppress(PimergeError):
            key = match(names, parameter, parameter)
            found[parameter] = (names.shared or {}).get(key, key)
    return found


def is_equal(checkpoint: Checkpoint, key: str | None, tensor: Tensor) -> bool:
    """Whether a tensor has the values of the checkpoint's tensor with this key, in the checkpoint's dtype."""
    if key is None or checkpoint.entry(key).dtype not in FLOATS or checkpoint.entry(key).shape != tuple(tensor.shape):
        return False
    weight = checkpoint.read(key)
    return bool(tensor.to(weight.dtype).equal(weight))
