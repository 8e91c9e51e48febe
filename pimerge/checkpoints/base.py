"""Find the base model of an expert, without loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_bytes, sha256_files


@dataclass(frozen=True)
class Base:
    """A base model: its name in the configs of its experts, and its location.

    Attributes:
        name: a folder or a Hub id, as in ``adapter_config.json``.
        revision: the revision of a Hub id.
        folder: the local folder, or the snapshot in the Hub's local cache; None if neither exists.
    """

    name: str
    revision: str | None
    folder: Path | None

    @cached_property
    def identity(self) -> str:
        """Distinguishes bases: the content's hash for a folder, the commit for a Hub id.

        A base that is not on this machine is identified by name and revision only.
        """
        if self.folder is None:
            return f"{self.name}@{self.revision or 'main'}"
        if self.folder.parent.name == "snapshots":
            return f"{self.name}@{self.folder.name}"
        return _content(self.folder.resolve())

    @property
    def is_known(self) -> bool:
        """Whether it has a name; the files of some formats name no base."""
        return bool(self.name)

    def require_reachable(self) -> None:
        """Refuse a base that is neither on this machine nor a Hub id."""
        if not self.name:
            raise PimergeError(
                "adapter_config.json names no base model", "set base_model_name_or_path there, or pass --base"
            )
        if self.is_missing:
            raise PimergeError(
                f"the base model '{self.name}' does not exist: it is neither a folder with a config.json nor a Hub id",
                "pass --base with its folder or Hub id",
            )

    @property
    def is_missing(self) -> bool:
        """Whether it is neither on this machine nor a Hub id."""
        return self.folder is None and not (self.name and is_hub_id(self.name))

    @property
    def label(self) -> str:
        """How a message names it."""
        return f"the base '{self.name}'" if self.name else "a base that its adapter_config.json does not name"

    @property
    def source(self) -> str:
        """The folder if there is one, else the Hub id, as transformers loads it."""
        return str(self.folder or self.name)

    @property
    def reference(self) -> str:
        """The value for ``--base``: the folder, or the Hub id with its revision."""
        if self.folder is not None and self.folder.parent.name != "snapshots":
            return str(self.folder.resolve())
        return f"{self.name}@{self.revision}" if self.revision else self.name


def find_base(name: str | None, revision: str | None, near: Path) -> Base:
    """Find the base that an expert names; :meth:`Base.require_reachable` refuses one that is nowhere.

    The search covers the expert's folder, the folders above it and the working folder, so that a pool and its base can
    move together; then the Hub's local cache. An expert can also be merged without its base.

    Args:
        name: ``base_model_name_or_path`` in the adapter's config.
        near: the expert's folder.
    """
    if not name:
        return Base("", None, None)
    folder = folder_from(near, name) or folder_from(Path.cwd(), name, above=False)
    if folder is None and is_hub_id(name):
        folder = _cached_snapshot(name, revision)
    return Base(name, revision, folder)


def given_base(reference: str) -> Base:
    """The base of a folder or a Hub id with an optional revision, as ``--base`` takes it."""
    name, _, revision = reference.partition("@")
    base = find_base(name, revision or None, Path.cwd())
    base.require_reachable()
    return base


def folder_from(near: Path, name: str, above: bool = True) -> Path | None:
    """Find the folder of a base relative to another folder or to the folders above it."""
    near = near.resolve()
    for folder in (near, *near.parents) if above else (near,):
        if os.path.isfile(folder / name / "config.json"):  # unlike Path.is_file, False for an invalid name
            return folder / name
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name is valid for a repository on the Hub.

    >>> [is_hub_id(name) for name in ("google/vit", "./vit", "a--b")]
    [True, False, False]
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        try_to_load_from_cache(name, "config.json")  # raises for an invalid name
    except HFValidationError:
        return False
    return True


def _cached_snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


@cache
def _content(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise PimergeError(
            f"the base model's folder '{folder}' holds no weights", "it needs model.safetensors (or its shards)"
        )
    return "sha256:" + sha256_bytes("".join(sha256_files(files)).encode())
