"""``pimerge.json``: a record of how an output was made."""

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
    """An expert that the output was made from."""

    model_config = ConfigDict(extra="forbid")

    name: str
    sha256: str


class Manifest(BaseModel):
    """The content of ``pimerge.json``.

    Attributes:
        command: the command that wrote the folder.
        options: every option with the value that was used.
        inputs: the experts, in order.
        outputs: file name → SHA-256, for the files beside the manifest.
        results: what the stage measured, such as truncation errors and losses.
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
    """Versions of Python, of pimerge and of the libraries that the numbers depend on."""
    return {"pimerge": __version__, "python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


class Hashed(Protocol):
    """What the manifest records of an expert or a checkpoint."""

    @property
    def name(self) -> str:
        """The name that messages use."""

    @property
    def sha256(self) -> str:
        """The hash of its tensors."""


def inputs_of(experts: Sequence[Hashed]) -> list[Input]:
    """The manifest's record of the experts that an output was made from."""
    return [Input(name=expert.name, sha256=expert.sha256) for expert in experts]
