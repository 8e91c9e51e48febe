"""The store of embeddings: ``embeddings.json`` and a sidecar of tensors for each expert.

The sidecar ``embeddings/NAME.safetensors`` holds the full diagonal, one tensor per parameter, under the keys
of the adapter's own file; ``embeddings/NAME.marginals.safetensors`` the marginals of each adapted layer
(:mod:`pimerge.marginals`); ``embeddings/NAME.grams.safetensors``, where it was asked for, the Gram matrix of each
adapted layer's inputs, under the module's name. A sidecar is written before the document that names it, so the
store is whole at any moment; it grows by one expert at a time, and several processes may extend it at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pimerge.errors import PimergeError, nearest
from pimerge.expert import CONFIG, Expert, open_expert
from pimerge.files import disk_errors, json_text, read_json, relative_to, sha256_bytes, sha256_file, write_file
from pimerge.task import parse_document
from pimerge.tensorfile import TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 2
SIDECARS = "embeddings"
DIAGONAL, MARGINALS, GRAMS = "diagonal", "marginals", "grams"


class Settings(BaseModel):
    """What was asked for; an embedding made with other settings is computed anew."""

    model_config = ConfigDict(extra="forbid")

    labels: str = "true"
    max_examples: int = 1000
    shots: int | None = None
    seed: int = 0
    dtype: str = "float32"


class Sidecar(BaseModel):
    """A file beside the document: relative to its folder, with its SHA-256."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str


class Embedding(BaseModel):
    """One expert's entry.

    Attributes:
        path: the expert's folder, relative to the store's.
        sha256: of the adapter's tensors; ``config_sha256`` of its config, ``task_sha256`` of its task and data.
        base: the base model's identity.
        examples, tokens: what the estimate is made of.
        route: ``rules`` or ``loop``.
        norm: ‖F‖₂ over all parameters; ``trace`` is ΣF, ``largest`` the largest entry.
        modules: module → trace of its Fisher.
        sketches: ``gradients`` and ``update``, the two parts of the measure ``fisher``; see :mod:`pimerge.sketch`.
        sidecars: ``diagonal``, ``marginals`` and, where there are some, ``grams``.
    """

    model_config = ConfigDict(extra="forbid")

    path: str
    sha256: str
    config_sha256: str
    task_sha256: str
    kind: str
    base: str
    task: dict[str, Any]
    estimator: str = "diagonal empirical Fisher, squared per example"
    settings: Settings
    examples: int
    tokens: int
    device: str
    route: str
    norm: float
    trace: float
    largest: float
    modules: dict[str, float]
    sketches: dict[str, str]
    sidecars: dict[str, Sidecar]


@dataclass(frozen=True)
class Stored:
    """One expert as a measure sees it; tensors are read when they are asked for.

    Attributes:
        expert: its adapter.
        diagonal: of its Fisher; None for a measure that does not need it. ``marginals``: the same.
    """

    expert: Expert
    diagonal: TensorFile | None = None
    marginals: TensorFile | None = None

    @property
    def parameters(self) -> list[str]:
        """The keys of the factors and their biases in the adapter's file, in order."""
        modules = self.expert.modules.values()
        return sorted(key for module in modules for key in (module.A, module.B, module.bias) if key)

    def fisher(self, key: str) -> Tensor:
        """The diagonal Fisher of one tensor."""
        assert self.diagonal is not None
        return self.diagonal.read(key)

    @property
    def layers(self) -> list[str]:
        """The layers that have marginals."""
        assert self.marginals is not None
        return sorted({name.rpartition(".")[0] for name in self.marginals.entries})

    def marginal(self, name: str) -> Tensor:
        """One vector of marginals, ``LAYER.input`` or ``LAYER.output``."""
        assert self.marginals is not None
        return self.marginals.read(name)


class Gains(BaseModel):
    """What the store's experts were measured to be worth for one target (``pimerge rank --calibrate``).

    Attributes:
        task_sha256: of the target's task and data, as they were.
        examples: of the target that were looked at.
        sources: name → the sha256 of its tensors, and the gain in accuracy over the bare base at each scale.
    """

    model_config = ConfigDict(extra="forbid")

    task_sha256: str
    examples: int
    sources: dict[str, tuple[str, dict[str, float]]]


class Document(BaseModel):
    """The content of ``embeddings.json``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    experts: dict[str, Embedding] = Field(default_factory=dict)
    gains: dict[str, Gains] = Field(default_factory=dict)


class Store:
    """An ``embeddings.json`` and its sidecars.

    Args:
        path: the JSON document; it need not be there yet.

    Raises:
        PimergeError: if the document does not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document = self._read()

    @property
    def experts(self) -> dict[str, Embedding]:
        """Name → entry, in alphabetical order."""
        return self.document.experts

    def folder_of(self, name: str) -> Path:
        """The folder of an expert in the store."""
        return self.path.parent / self.document.experts[name].path

    def open(self, name: str) -> Expert:
        """Open an expert of the store and check that it is the one that was embedded.

        Raises:
            PimergeError: if its folder is gone, or its tensors or its config have changed.
        """
        if not self.folder_of(name).is_dir():
            raise PimergeError(f"the folder '{self.folder_of(name)}' is gone", "run 'pimerge embed' again")
        expert, entry = open_expert(self.folder_of(name)), self.document.experts[name]
        if (expert.sha256, sha256_file(expert.path / CONFIG)) != (entry.sha256, entry.config_sha256):
            raise PimergeError(f"'{expert.path}' has changed since it was embedded", "run 'pimerge embed' again")
        return expert

    def find(self, target: str) -> str | None:
        """The name in the store of a target given by name or by folder; None if it is not there."""
        if target in self.document.experts:
            return target
        # the paths of the document have no links in them: to resolve thousands anew would take seconds
        here, folder = str(self.path.parent.resolve()), str(Path(target).resolve())
        paths = ((name, os.path.normpath(os.path.join(here, entry.path))) for name, entry in self.experts.items())
        return next((name for name, path in paths if path == folder), None)

    def find_sha(self, sha256: str) -> str | None:
        """The first name in the store whose adapter's tensors have this SHA-256; None if there is none."""
        return next((name for name, entry in self.experts.items() if entry.sha256 == sha256), None)

    def diagonal(self, name: str) -> dict[str, Tensor]:
        """The full diagonal of one expert: key → tensor.

        Raises:
            PimergeError: as :meth:`diagonal_file`.
        """
        file = self.diagonal_file(name)
        return {key: file.read(key) for key in file.entries}

    def diagonal_file(self, name: str) -> TensorFile:
        """The full diagonal of one expert, to be read one tensor at a time.

        Raises:
            PimergeError: if the sidecar is gone or is not the one that the document names.
        """
        return self._checked(self.document.experts[name].sidecars[DIAGONAL], "run 'pimerge embed' again")

    def marginals_file(self, name: str) -> TensorFile:
        """The marginals of one expert's layers.

        Raises:
            PimergeError: if the sidecar is gone or is not the one that the document names.
        """
        return self._checked(self.document.experts[name].sidecars[MARGINALS], "run 'pimerge embed' again")

    def member(self, name: str, expert: Expert, needs: str) -> Stored:
        """An expert of the store with what a measure ``NEEDS``.

        Raises:
            PimergeError: if a sidecar that it needs is gone or has changed.
        """
        return Stored(
            expert,
            self.diagonal_file(name) if needs == "fisher" else None,
            self.marginals_file(name) if needs == "marginals" else None,
        )

    def grams(self, name: str) -> TensorFile:
        """The Gram matrices of the inputs of one expert's layers: module → (d_in × d_in), to be read one by one.

        Raises:
            PimergeError: if there are none, or the sidecar is gone or is not the one that the document names.
        """
        hint = f"run 'pimerge embed --grams {self.folder_of(name)}'"
        if not self.has_grams(name):
            raise PimergeError(f"the store '{self.path}' has no Gram matrices of '{name}'", hint)
        return self._checked(self.document.experts[name].sidecars[GRAMS], hint)

    def has_grams(self, name: str) -> bool:
        """Whether the expert is in the store with Gram matrices."""
        entry = self.document.experts.get(name)
        return entry is not None and GRAMS in entry.sidecars

    def grams_size(self, name: str) -> int:
        """Bytes of the expert's Gram matrices on the disk; 0 without any."""
        sidecar = self.document.experts[name].sidecars.get(GRAMS)
        return (self.path.parent / sidecar.file).stat().st_size if sidecar and self._is_whole(sidecar) else 0

    def is_current(self, name: str, expected: Mapping[str, Any], grams: bool = False) -> bool:
        """Whether the entry has these fields and its sidecars are whole.

        Args:
            grams: whether it must have its Gram matrices, whole, too.
        """
        entry = self.document.experts.get(name)
        if entry is None or any(getattr(entry, field) != value for field, value in expected.items()):
            return False
        needed = [DIAGONAL, MARGINALS, *([GRAMS] if grams else [])]
        return all(part in entry.sidecars and self._is_whole(entry.sidecars[part]) for part in needed)

    def add(self, name: str, fields: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the sidecars, then the document with the new entry.

        Args:
            fields: of the entry, but for those that follow from the diagonal.
            tensors: ``diagonal``, ``marginals`` and maybe ``grams`` → name → tensor.

        Raises:
            PimergeError: if the disk refuses.
        """
        diagonal = tensors[DIAGONAL]
        contents = {part: _safetensors(values) for part, values in tensors.items()}
        sidecars = {
            part: Sidecar(file=_sidecar_of(name, part), sha256=sha256_bytes(content))
            for part, content in contents.items()
        }
        squares = sum(float(value.double().square().sum()) for value in diagonal.values())
        modules: dict[str, float] = {}
        for key, value in diagonal.items():
            module = key.removeprefix("base_model.model.").partition(".lora_")[0]
            modules[module] = modules.get(module, 0.0) + float(value.double().sum())
        entry = Embedding(
            **fields,
            norm=squares**0.5,
            trace=sum(modules.values()),
            largest=max(float(value.max()) for value in diagonal.values()),
            modules=dict(sorted(modules.items())),
            sidecars=sidecars,
        )
        own = {sidecar.file for sidecar in sidecars.values()}
        with self._changing() as document:
            experts = document.experts
            for other in experts.keys() - {name}:
                if own & _sidecars([experts[other]]):  # 'a.grams' beside the Gram matrices of 'a'
                    raise PimergeError(f"the sidecars of '{name}' and '{other}' have one name", "rename one expert")
            for part, content in contents.items():
                write_file(self.path.parent / sidecars[part].file, content)
            experts[name] = entry

    def drop(self, name: str) -> None:
        """Remove an entry and its sidecars, and what is known of its gains."""
        with self._changing() as document:
            document.experts.pop(name, None)
            document.gains.pop(name, None)
            for gains in document.gains.values():
                gains.sources.pop(name, None)

    def add_gains(self, target: str, gains: Gains) -> None:
        """Write what the experts are worth for a target."""
        with self._changing() as document:
            document.gains[target] = gains

    def history(self) -> dict[str, dict[str, dict[float, float]]]:
        """Target → source → scale → gain, of experts and tasks that are as they were measured."""
        entries = self.document.experts
        return {
            target: {
                name: {float(scale): gain for scale, gain in by_scale.items()}
                for name, (sha256, by_scale) in gains.sources.items()
                if name in entries and entries[name].sha256 == sha256
            }
            for target, gains in sorted(self.document.gains.items())
            if target in entries and entries[target].task_sha256 == gains.task_sha256
        }

    def overlay(self, folder: Path) -> Store:
        """A store in another folder with the same entries, to which more can be added without touching this one."""
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
        return Store(folder / self.path.name)

    def path_of(self, expert: Expert) -> str:
        """An expert's folder as the document has it."""
        return relative_to(expert.path, self.path.parent)

    def _is_whole(self, sidecar: Sidecar) -> bool:
        path = self.path.parent / sidecar.file
        return path.is_file() and sha256_file(path) == sidecar.sha256

    def _checked(self, sidecar: Sidecar, hint: str) -> TensorFile:
        """Open a sidecar that has to be whole."""
        path = self.path.parent / sidecar.file
        if not self._is_whole(sidecar):
            state = "has changed" if path.is_file() else "is gone"
            raise PimergeError(f"the sidecar '{path}' {state}", hint)
        return open_tensors(path)

    @contextmanager
    def _changing(self) -> Iterator[Document]:
        """Change the document under a lock, starting from what other processes have written meanwhile.

        Sidecars that it no longer names are removed.
        """
        from filelock import FileLock

        folder = self.path.parent / SIDECARS
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire()
        try:
            document = self._read()
            before = _sidecars(document.experts.values())
            yield document
            document.experts = dict(sorted(document.experts.items()))
            write_file(self.path, json_text(document.model_dump()))
            self.document = document
            for sidecar in before - _sidecars(document.experts.values()):
                (self.path.parent / sidecar).unlink(missing_ok=True)
        finally:
            lock.release()

    def _read(self) -> Document:
        if not self.path.exists():
            return Document()
        document = None
        with suppress(OSError, ValidationError):  # parsed at once, which takes a fraction; else see what is wrong
            document = Document.model_validate_json(self.path.read_bytes())
        if document is None or "schema_version" not in document.model_fields_set or document.schema_version != SCHEMA:
            content = read_json(self.path)
            found = content.get("schema_version") if isinstance(content, dict) else None
            if found != SCHEMA:
                raise PimergeError(
                    f"'{self.path}' has the schema version {found}, expected {SCHEMA}",
                    "it is no store, or another version's: remove it, or choose another --store",
                )
            document = parse_document(Document, self.path, "remove the file and run 'pimerge embed' again")
        document.experts = dict(sorted(document.experts.items()))
        return document


def _sidecar_of(name: str, part: str) -> str:
    return f"{SIDECARS}/{name}{'' if part == DIAGONAL else '.' + part}.safetensors"


def _sidecars(entries: Iterable[Embedding]) -> set[str]:
    """The files that some entries name."""
    return {sidecar.file for entry in entries for sidecar in entry.sidecars.values()}


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({key: value.cpu().contiguous() for key, value in tensors.items()}, {"format": "pt"})


def open_store(path: Path) -> Store:
    """Open a store that has to be there.

    Raises:
        PimergeError: if it is not there, is empty or does not fit.
    """
    if not path.is_file():
        raise PimergeError(f"there is no store '{path}'", "run 'pimerge embed ./experts' first, or pass --store")
    store = Store(path)
    if not store.experts:
        raise PimergeError(f"the store '{path}' holds no expert", "run 'pimerge embed ./experts' first")
    return store


def unknown_target(target: str, store: Store) -> PimergeError:
    """The error for a target that is neither in the store nor a folder."""
    return PimergeError(
        f"there is no target '{target}': it is neither in '{store.path}' nor a folder",
        nearest(target, list(store.experts)),
    )
