"""Files of tensors beside the store's document, each named by its content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.core.files import sha256_bytes
from pimerge.embedding.store_schema import Sidecar

if TYPE_CHECKING:
    from torch import Tensor

_HASHED = re.compile(r"\.[0-9a-f]{12}\.safetensors$")
_LONGEST = 150  # letters of an expert's name in a file's


def sidecar_content(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    """Return the bytes of a file; with at most one item of metadata, since the order of several is not fixed."""
    from safetensors.torch import save

    return save({key: value.cpu().contiguous() for key, value in tensors.items()}, metadata or {"format": "pt"})


def sidecar_of(folder: str, name: str, part: str, content: bytes) -> Sidecar:
    """Name a sidecar by its expert, its part (``""`` or ``".marginals"``) and the hash of its content."""
    sha256 = sha256_bytes(content)
    start = name.replace("/", "--")[:_LONGEST]  # of experts in folders of one name
    return Sidecar(file=f"{folder}/{start}{part}.{sha256[:12]}.safetensors", sha256=sha256)


def hashed_files(folder: Path) -> set[str]:
    """The names of the sidecars in a folder; a stopped process left those that the document does not name."""
    return {file.name for file in folder.iterdir() if _HASHED.search(file.name)} if folder.is_dir() else set()
