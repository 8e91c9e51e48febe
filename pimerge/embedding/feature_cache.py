"""Cache of features on disk, keyed by the hashes of everything that they depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.checkpoints.safetensors_file import open_tensors
from pimerge.core.errors import PimergeError
from pimerge.core.files import put_in_order, sha256_bytes, write_file

if TYPE_CHECKING:
    from torch import Tensor


class FeatureCache:
    """A folder of features with one file per candidate.

    Args:
        folder: created at the first write; None disables the cache. After a failed write nothing more is written, and
            ``notes`` says why.
        data: identities of the examples and the base, on which all features depend.
    """

    def __init__(self, folder: Path | None, data: Sequence[Any]) -> None:
        self._folder, self._data = folder, data
        self.notes: list[str] = []

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a candidate, and compute them if they are not in the folder.

        Args:
            key: identity of the candidate.
        """
        if self._folder is None:
            return compute()
        file = self._folder / f"{sha256_bytes(json.dumps([key, *self._data]).encode())[:32]}.safetensors"
        with suppress(PimergeError):  # a damaged file is computed again
            if file.is_file():
                put_in_order(file)
                tensors = open_tensors(file)
                return {name: tensors.read(name) for name in tensors.entries}
        from safetensors.torch import save

        found = compute()
        try:
            write_file(file, save({name: value.contiguous() for name, value in found.items()}, {"format": "pt"}))
        except PimergeError as error:  # the ranking itself may be written to another folder
            self.notes.append(f"features are not cached for the next ranking: {error.problems[0].message}")
            self._folder = None
        return found
