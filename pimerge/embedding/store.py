"""The store of embeddings: ``embeddings.json`` and files of tensors beside it, the sidecars.

``embeddings/NAME.HASH.safetensors`` holds the full diagonal of the Fisher information, one tensor per parameter, under
the keys of the adapter's own file. ``NAME.marginals.HASH.safetensors`` holds the second moments of each adapted layer
(:mod:`pimerge.embedding.layer_moments`) and its update in random directions
(:mod:`pimerge.embedding.random_projection`). The optional ``NAME.grams.HASH.safetensors`` holds the input Gram of each
adapted layer under the module's name. HASH is the start of the file's own SHA-256: so a new sidecar never replaces an
old one. It is written before the document that names it, and the old one is removed after. The store is complete at any
moment, and several processes can extend it at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.checkpoints.safetensors_file import TensorFile, open_tensors
from pimerge.core.errors import PimergeError, nearest, passed_over
from pimerge.core.files import (
    disk_errors,
    json_text,
    output_lock,
    put_in_order,
    read_json,
    relative_to,
    sha256_file,
    write_file,
)
from pimerge.embedding.sidecars import hashed_files, sidecar_content, sidecar_of
from pimerge.embedding.store_schema import Embedding, MeasuredGains, Sidecar, StoreDocument, read_document
from pimerge.embedding.store_view import StoreView

if TYPE_CHECKING:
    from torch import Tensor

SIDECARS = "embeddings"
DIAGONAL, SECOND_MOMENTS, GRAMS = "diagonal", "marginals", "grams"
# the part of a key after the module's name
_TENSOR = re.compile(
    r"\.(?:\w*(?:lora|vera)|ia3|ln_tuning|bitfit|bottleneck|hada|hira|lokr|fourierft|c3a|miss|shira|waveft)_.*"
)
TRACES = "traces"  # of the modules, in the metadata of the diagonal, to keep the document small


class Store:
    """An ``embeddings.json`` and its sidecars.

    Args:
        path: the JSON document; it need not exist yet.
        is_overlay: whether it names sidecars of another store; see :meth:`overlay`.
    """

    def __init__(self, path: Path, *, is_overlay: bool = False) -> None:
        self.path, self._is_overlay = path, is_overlay
        self.document = read_document(path, is_overlay=is_overlay)

    @property
    def experts(self) -> dict[str, Embedding]:
        """Name → entry, in alphabetical order."""
        return self.document.experts

    @property
    def sidecars(self) -> Path:
        """The folder of the sidecars: ``embeddings`` for ``embeddings.json``, ``NAME-embeddings`` for another store."""
        return self.path.with_name(SIDECARS if self.path.stem == SIDECARS else f"{self.path.stem}-{SIDECARS}")

    def folder_of(self, name: str) -> Path:
        """The folder of an expert in the store."""
        return self.path.parent / self.document.experts[name].path

    def open(self, name: str) -> Expert:
        """Open an expert of the store and check that it has not changed since it was embedded."""
        if not (folder := self.folder_of(name)).is_dir():
            raise PimergeError(f"the folder '{folder}' is gone", "run 'pimerge embed' again")
        expert, entry = open_expert(folder), self.document.experts[name]
        if (expert.sha256, expert.config_sha256) != (entry.sha256, entry.config_sha256):
            raise PimergeError(f"'{expert.path}' has changed since it was embedded", "run 'pimerge embed' again")
        return expert if expert.name == name else replace(expert, label=name)

    def base_name(self, name: str) -> str:
        """Return the name of an expert's base from its config; the base's identity if its folder no longer exists."""
        with passed_over():
            return str(read_json(self.folder_of(name) / CONFIG)["base_model_name_or_path"])
        return self.document.experts[name].base

    def find(self, target: str) -> str | None:
        """Return the name in the store of an expert given by name or folder; None if the store does not hold it."""
        if target in self.document.experts:
            return target
        # the paths of the document have no links, and resolving thousands of paths takes seconds
        here, folder = str(self.path.parent.resolve()), str(Path(target).resolve())
        paths = ((name, os.path.normpath(os.path.join(here, entry.path))) for name, entry in self.experts.items())
        return next((name for name, path in paths if path == folder), None)

    def find_sha(self, sha256: str) -> str | None:
        """Return the first name in the store whose adapter tensors have this SHA-256; None if there is none."""
        return next((name for name, entry in self.experts.items() if entry.sha256 == sha256), None)

    def diagonal(self, name: str) -> dict[str, Tensor]:
        """Read the full diagonal of one expert: key → tensor."""
        file = self.diagonal_file(name)
        return {key: file.read(key) for key in file.entries}

    def diagonal_file(self, name: str) -> TensorFile:
        """Open the full diagonal of one expert, to be read one tensor at a time."""
        return self._checked(self.document.experts[name].sidecars[DIAGONAL], "run 'pimerge embed' again")

    def traces(self, name: str) -> dict[str, float]:
        """Return module → trace of its Fisher information, for one expert."""
        found: dict[str, float] = json.loads(self.diagonal_file(name).metadata[TRACES])
        return found

    def second_moments_file(self, name: str) -> TensorFile:
        """Open the second moments of one expert's layers."""
        return self._checked(self.document.experts[name].sidecars[SECOND_MOMENTS], "run 'pimerge embed' again")

    def view(self, name: str, expert: Expert, *, diagonal: bool = False, moments: bool = False) -> StoreView:
        """Return the store view of an expert, with the sidecars that a measure reads."""
        second_moments = self.second_moments_file(name) if moments else None
        return StoreView(expert, self.diagonal_file(name) if diagonal else None, second_moments)

    def grams(self, name: str) -> TensorFile:
        """Open the input Grams of one expert's layers: module → (d_in × d_in), to be read one at a time."""
        hint = f"run 'pimerge embed --grams {self.folder_of(name)}'"
        if not self.has_grams(name):
            raise PimergeError(f"the store '{self.path}' has no Gram matrices of '{name}'", hint)
        return self._checked(self.document.experts[name].sidecars[GRAMS], hint)

    def has_grams(self, name: str) -> bool:
        """Whether the store holds input Grams of the expert."""
        return name in self.experts and GRAMS in self.experts[name].sidecars

    def grams_size(self, name: str) -> int:
        """Return the size of the expert's input Grams on disk in bytes; 0 without any."""
        sidecar = self.document.experts[name].sidecars.get(GRAMS)
        return (self.path.parent / sidecar.file).stat().st_size if sidecar and self._is_whole(sidecar) else 0

    def is_current(self, name: str, expected: Mapping[str, Any], grams: bool = False) -> bool:
        """Whether the entry has these values and its sidecars are intact.

        Args:
            grams: whether intact input Grams are required as well.
        """
        entry = self.document.experts.get(name)
        if entry is None or any(getattr(entry, field) != value for field, value in expected.items()):
            return False
        needed = [DIAGONAL, SECOND_MOMENTS, *([GRAMS] if grams else [])]
        return all(part in entry.sidecars and self._is_whole(entry.sidecars[part]) for part in needed)

    def add(self, name: str, fields: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the sidecars, then the document with the new entry.

        Args:
            fields: fields of the entry, except for those that are computed from the diagonal.
            tensors: ``diagonal``, ``marginals`` and optionally ``grams`` → name → tensor.
        """
        diagonal = tensors[DIAGONAL]
        traces: dict[str, float] = {}
        for key, value in diagonal.items():
            module = _TENSOR.sub("", key.removeprefix("base_model.model."))
            traces[module] = traces.get(module, 0.0) + float(value.double().sum())
        metadata = {DIAGONAL: {TRACES: json.dumps(dict(sorted(traces.items())))}}
        contents = {part: sidecar_content(values, metadata.get(part)) for part, values in tensors.items()}
        sidecars = {
            part: sidecar_of(self.sidecars.name, name, "" if part == DIAGONAL else f".{part}", content)
            for part, content in contents.items()
        }
        squares = sum(float(value.double().square().sum()) for value in diagonal.values())
        entry = Embedding(
            **fields,
            norm=squares**0.5,
            trace=sum(traces.values()),
            largest=max(float(value.max()) for value in diagonal.values()),
            sidecars=sidecars,
        )
        with self._changing() as document:
            for part, content in contents.items():
                write_file(self.path.parent / sidecars[part].file, content)
            document.experts[name] = entry

    def tidy(self) -> None:
        """Remove what a stopped process left."""
        put_in_order(self.path)
        if hashed_files(self.sidecars) - self._own_sidecars(self.document) and not self.sidecars.is_symlink():
            with self._changing():
                pass

    def drop(self, name: str) -> None:
        """Remove an entry, its sidecars and its measured gains."""
        with self._changing() as document:
            document.experts.pop(name, None)
            document.gains.pop(name, None)
            for gains in document.gains.values():
                gains.sources.pop(name, None)

    def add_gains(self, target: str, gains: MeasuredGains) -> None:
        """Write the measured gains of the experts for a target."""
        with self._changing() as document:
            document.gains[target] = gains

    def history(self) -> dict[str, dict[str, dict[float, float]]]:
        """Return target → source → strength → gain, for experts and tasks that are unchanged since then."""
        entries = self.document.experts
        return {
            target: {
                name: {float(strength): gain for strength, gain in by_scale.items()}
                for name, (sha256, by_scale) in gains.sources.items()
                if name in entries and entries[name].sha256 == sha256
            }
            for target, gains in sorted(self.document.gains.items())
            if target in entries and entries[target].task_sha256 == gains.task_sha256
        }

    def overlay(self, folder: Path) -> Store:
        """Create a store in another folder with the same entries; adding to it does not change this store."""
        here = self.path.parent.resolve()
        experts = {
            name: entry.model_copy(
                update={
                    "path": str(here / entry.path),
                    "sidecars": {
                        part: sidecar.model_copy(update={"file": str(here / sidecar.file)})
                        for part, sidecar in entry.sidecars.items()
                    },
                }
            )
            for name, entry in self.experts.items()
        }
        document = self.document.model_copy(update={"experts": experts})
        write_file(folder / self.path.name, json_text(document.model_dump()))
        return Store(folder / self.path.name, is_overlay=True)

    def path_of(self, expert: Expert) -> str:
        """Return an expert's folder relative to the document."""
        return relative_to(expert.path, self.path.parent)

    def _is_whole(self, sidecar: Sidecar) -> bool:
        path = self.path.parent / sidecar.file
        return path.is_file() and sha256_file(path) == sidecar.sha256

    def _checked(self, sidecar: Sidecar, hint: str) -> TensorFile:
        """Open a sidecar after checking its hash."""
        path = self.path.parent / sidecar.file
        if not self._is_whole(sidecar):
            state = "has changed" if path.is_file() else "is gone"
            raise PimergeError(f"the sidecar '{path}' {state}", hint)
        return open_tensors(path)

    @contextmanager
    def _changing(self) -> Iterator[StoreDocument]:
        """Change the latest document on disk under a lock, and remove sidecars that it no longer names."""
        with output_lock(self.path):
            with disk_errors(self.sidecars):
                self.sidecars.mkdir(parents=True, exist_ok=True)
            document = read_document(self.path, is_overlay=self._is_overlay)
            before = self._own_sidecars(document)
            yield document
            document.experts = dict(sorted(document.experts.items()))
            write_file(self.path, json_text(document.model_dump()))
            self.document = document
            if self.sidecars.is_symlink():  # its files may be those of another store
                return
            for name in (before | hashed_files(self.sidecars)) - self._own_sidecars(document):
                (self.sidecars / name).unlink(missing_ok=True)

    def _own_sidecars(self, document: StoreDocument) -> set[str]:
        """The names of the files in the folder of the sidecars that the document names; an overlay names others."""
        files = [Path(each.file) for entry in document.experts.values() for each in entry.sidecars.values()]
        return {file.name for file in files if file.parent == Path(self.sidecars.name)}


def open_store(path: Path) -> Store:
    """Open an existing store that holds experts."""
    if not path.is_file():
        raise PimergeError(f"there is no store '{path}'", "run 'pimerge embed ./experts' first, or pass --store")
    store = Store(path)
    if not store.experts:
        raise PimergeError(f"the store '{path}' holds no expert", "run 'pimerge embed ./experts' first")
    return store


def unknown_target(target: str, store: Store) -> PimergeError:
    """Return the error for a target that is neither in the store nor a folder."""
    return PimergeError(
        f"there is no target '{target}': it is neither in '{store.path}' nor a folder",
        nearest(target, list(store.experts)),
    )
