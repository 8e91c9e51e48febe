"""``pimerge.json``: a record of how an output was created."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from pimerge.core.errors import AlreadyDone, PimergeError
from pimerge.core.files import require_absent, sha256_bytes, sha256_file
from pimerge.core.version import __version__

MANIFEST_FILE = "pimerge.json"
_LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors")


class Input(BaseModel):
    """An input expert of the output."""

    model_config = ConfigDict(extra="forbid")

    name: str
    sha256: str


class Manifest(BaseModel):
    """The content of ``pimerge.json``.

    Attributes:
        command: the command that wrote the folder.
        options: name → value of every option.
        inputs: the experts, in order.
        outputs: file name → SHA-256, for the files beside the manifest.
        results: measurements of the stage, such as truncation errors and losses.
        request: the hash of all that decides the outputs, by which a second run finds them done.
    """

    model_config = ConfigDict(extra="forbid")

    command: str
    options: dict[str, Any]
    device: str
    versions: dict[str, str]
    inputs: list[Input]
    outputs: dict[str, str]
    results: dict[str, Any]
    request: str = ""


def library_versions() -> dict[str, str]:
    """Versions of Python, pimerge and the libraries that affect the results."""
    return {"pimerge": __version__, "python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


class Hashed(Protocol):
    """An expert or checkpoint as the manifest records it."""

    @property
    def name(self) -> str:
        """The name used in messages."""

    @property
    def sha256(self) -> str:
        """SHA-256 of its tensors."""


def inputs_of(experts: Sequence[Hashed]) -> list[Input]:
    """The manifest's record of an output's input experts."""
    return [Input(name=expert.name, sha256=expert.sha256) for expert in experts]


def request_hash(**decisive: Any) -> str:
    """The hash of all that decides an output: inputs by their hashes, options, and the versions of the libraries."""
    document = {**decisive, "versions": library_versions()}
    return sha256_bytes(json.dumps(document, sort_keys=True, default=str).encode())


def raise_if_done(output: Path, request: str) -> None:
    """Raise :class:`AlreadyDone` if a folder holds the whole output of this request."""
    try:
        manifest = Manifest.model_validate_json((output / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return
    files = {output / Path(name).name: sha256 for name, sha256 in manifest.outputs.items()}
    if manifest.request == request and all(file.is_file() and sha256_file(file) == sha for file, sha in files.items()):
        raise AlreadyDone(output, manifest.results)


def require_absent_or_own(output: Path, force: bool) -> None:
    """Refuse an existing output without ``force``, unless it may be an earlier output of the same request."""
    is_single = output.suffix == ".safetensors" and output.is_file()  # it is compared with the result
    require_absent(output, force or is_single or (output / MANIFEST_FILE).is_file())


def refuse_foreign(output: Path) -> None:
    """Refuse to replace a folder that pimerge did not write: it may be the only copy of something."""
    if output.is_dir() and not (output / MANIFEST_FILE).is_file() and any(output.iterdir()):
        raise PimergeError(
            f"'{output}' was not written by pimerge (it has no {MANIFEST_FILE}), so --force does not replace it",
            "remove it yourself, or choose another --output",
        )
