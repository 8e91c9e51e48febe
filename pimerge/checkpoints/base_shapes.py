"""Names and shapes of a base's tensors, from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.safetensors_file import Entry
from pimerge.core.errors import PimergeError


def base_shapes(base: Base) -> Mapping[str, tuple[int, ...]]:
    """Key on disk → shape of each tensor, () if it is quantised; empty if the base is not here as safetensors."""
    return {} if base.folder is None else _shapes(base.folder)


def base_modules(base: Base) -> set[str]:
    """Names of the modules that hold tensors, also in others; empty if the base is not here as safetensors."""
    found: set[str] = set()
    for key in base_shapes(base):
        while (key := key.rpartition(".")[0]) and key not in found:
            found.add(key)
    return found


@lru_cache(maxsize=8)
def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    with suppress(PimergeError, OSError):
        checkpoint = open_checkpoint(folder)
        return {key: _shape(checkpoint.entry(key)) for key in checkpoint.home}
    return {}


def _shape(entry: Entry) -> tuple[int, ...]:
    return entry.shape if entry.dtype in FLOATS else ()  # the shape of a quantised tensor is not the layer's
