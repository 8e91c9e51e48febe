"""``pimerge.json``: how an output came about."""

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
    """An expert that went in."""

    model_config = ConfigDict(extra="forbid")

    name: str
    sha256: str


class Manifest(BaseModel):
    """The content of ``pimerge.json``.

    Attributes:
        command: the stage that wrote the folder.
        options: every option with the value that it came to have.
        inputs: the experts, in order.
        outputs: file name → SHA-256 of what was written beside it.
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
    """Versions of what decides the numbers."""
    return {
        "pimerge": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


class Hashed(Protocol):
    """An expert or a checkpoint, as far as the manifest knows it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def sha256(self) -> str:
        """Of its tensors."""


def inputs_of(experts: Sequence[Hashed]) -> list[Input]:
    """The manifest's record of what went in."""
    return [Input(name=expert.name, sha256=expert.sha256) for expert in experts]
