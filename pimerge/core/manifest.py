"""``pimerge.json``: a record of how an output was created."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

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
    """

    model_config = ConfigDict(extra="forbid")

    command: str
    options: dict[str, Any]
    device: str
    versions: dict[str, str]
    inputs: list[Input]
    outputs: dict[str, str]
    results: dict[str, Any]


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
