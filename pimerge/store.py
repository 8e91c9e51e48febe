"""The store of embeddings: ``embeddings.json`` and a sidecar of tensors for each expert.

The sidecar ``embeddings/NAME.safetensors`` holds the full diagonal, one tensor per parameter, under the keys
of the adapter's own file; ``embeddings/NAME.grams.safetensors``, where it was asked for, the Gram matrix of
each adapted layer's inputs, under the module's name. A sidecar is written before the document that names it, so
the store is whole at any moment; it grows by one expert at a time, and several processes may extend it at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from pimerge.errors import PimergeError, nearest
from pimerge.expert import CONFIG, Expert, open_expert
from pimerge.files import disk_errors, json_text, read_json, relative_to, sha256_bytes, sha256_file, write_file
from pimerge.task import parse_document
from pimerge.tensorfile import TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
SIDECARS = "embeddings"


class Settings(BaseModel):
    """What was asked for; an embedding made with other settings is computed anew."""

    model_config = ConfigDict(extra="forbid")

    labels: str = "true"
    max_examples: int = 1000
    shots: int | None = None
    seed: int = 0
    dtype: str = "float32"


class Embedding(BaseModel):
    """One expert's entry.

    Attributes:
        path: the expert's folder, relative to the store's.
        sha256: of the adapter's tensors; ``config_sha256`` of its config, ``task_sha256`` of its task and data.
        base: the base model's identity.
        examples, tokens: what the estimate is made of.
        route: ``rules`` or ``loop``.
        norm: ‖F‖₂ over all parameters; ``trace`` is ΣF.
        modules: module → trace of its Fisher.
        sidecar: file of the full diagonal, relative to the store's folder.
        grams_sidecar: file of the Gram matrices of the layers' inputs; None where there are none.
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
    modules: dict[str, float]
    sidecar: str
    sidecar_sha256: str
    grams_sidecar: str | None = None
    grams_sha256: str | None = None


class Document(BaseModel):
    """The content of ``embeddings.json``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    experts: dict[str, Embedding] = Field(default_factory=dict)


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
        return dict(sorted(self.document.experts.items()))

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
        folder = Path(target).resolve()
        return next((name for name in self.experts if self.folder_of(name).resolve() == folder), None)

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
        entry = self.document.experts[name]
        return self._checked(entry.sidecar, entry.sidecar_sha256, "run 'pimerge embed' again")

    def grams(self, name: str) -> TensorFile:
        """The Gram matrices of the inputs of one expert's layers: module → (d_in × d_in), to be read one by one.

        Raises:
            PimergeError: if there are none, or the sidecar is gone or is not the one that the document names.
        """
        entry, hint = self.document.experts[name], f"run 'pimerge embed --grams {self.folder_of(name)}'"
        if entry.grams_sidecar is None or entry.grams_sha256 is None:
            raise PimergeError(f"the store '{self.path}' has no Gram matrices of '{name}'", hint)
        return self._checked(entry.grams_sidecar, entry.grams_sha256, hint)

    def has_grams(self, name: str) -> bool:
        """Whether the expert is in the store with Gram matrices."""
        entry = self.document.experts.get(name)
        return entry is not None and entry.grams_sidecar is not None

    def grams_size(self, name: str) -> int:
        """Bytes of the expert's Gram matrices on the disk; 0 without any."""
        relative = self.document.experts[name].grams_sidecar
        sidecar = self.path.parent / (relative or "")
        return sidecar.stat().st_size if relative and sidecar.is_file() else 0

    def is_current(self, name: str, expected: Mapping[str, Any], grams: bool = False) -> bool:
        """Whether the entry has these fields and its sidecar is whole.

        Args:
            grams: whether it must have its Gram matrices, whole, too.
        """
        entry = self.document.experts.get(name)
        if entry is None or any(getattr(entry, field) != value for field, value in expected.items()):
            return False
        return self._is_whole(entry.sidecar, entry.sidecar_sha256) and (
            not grams or self._is_whole(entry.grams_sidecar, entry.grams_sha256)
        )

    def add(
        self,
        name: str,
        fields: Mapping[str, Any],
        diagonal: Mapping[str, Tensor],
        grams: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the sidecars, then the document with the new entry.

        Args:
            grams: module → Gram matrix of its inputs; None leaves the entry without any.

        Raises:
            PimergeError: if the disk refuses.
        """
        contents = {_sidecar_of(name): _safetensors(diagonal)}
        if grams is not None:
            contents[_grams_sidecar_of(name)] = _safetensors(grams)
        digests = {sidecar: sha256_bytes(content) for sidecar, content in contents.items()}
        squares = sum(float(value.double().square().sum()) for value in diagonal.values())
        modules: dict[str, float] = {}
        for key, value in diagonal.items():
            module = key.removeprefix("base_model.model.").partition(".lora_")[0]
            modules[module] = modules.get(module, 0.0) + float(value.double().sum())
        entry = Embedding(
            **fields,
            norm=squares**0.5,
            trace=sum(modules.values()),
            modules=dict(sorted(modules.items())),
            sidecar=_sidecar_of(name),
            sidecar_sha256=digests[_sidecar_of(name)],
            grams_sidecar=_grams_sidecar_of(name) if grams is not None else None,
            grams_sha256=digests.get(_grams_sidecar_of(name)),
        )
        with self._changing() as experts:
            for other in experts.keys() - {name}:
                if contents.keys() & _sidecars([experts[other]]):  # 'a.grams' beside the Gram matrices of 'a'
                    raise PimergeError(f"the sidecars of '{name}' and '{other}' have one name", "rename one expert")
            for sidecar, content in contents.items():
                write_file(self.path.parent / sidecar, content)
            experts[name] = entry

    def drop(self, name: str) -> None:
        """Remove an entry and its sidecars."""
        with self._changing() as experts:
            experts.pop(name, None)

    def path_of(self, expert: Expert) -> str:
        """An expert's folder as the document has it."""
        return relative_to(expert.path, self.path.parent)

    def _is_whole(self, relative: str | None, sha256: str | None) -> bool:
        sidecar = self.path.parent / (relative or "")
        return sidecar.is_file() and sha256_file(sidecar) == sha256

    def _checked(self, relative: str, sha256: str, hint: str) -> TensorFile:
        """Open a sidecar that has to be whole."""
        sidecar = self.path.parent / relative
        if not self._is_whole(relative, sha256):
            state = "has changed" if sidecar.is_file() else "is gone"
            raise PimergeError(f"the sidecar '{sidecar}' {state}", hint)
        return open_tensors(sidecar)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Embedding]]:
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
            yield document.experts
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
        content = read_json(self.path)
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise PimergeError(
                f"'{self.path}' has the schema version {found}, expected {SCHEMA}",
                "it is no store, or another version's: remove it, or choose another --store",
            )
        return parse_document(Document, self.path, "remove the file and run 'pimerge embed' again")


def _sidecar_of(name: str) -> str:
    return f"{SIDECARS}/{name}.safetensors"


def _grams_sidecar_of(name: str) -> str:
    return f"{SIDECARS}/{name}.grams.safetensors"


def _sidecars(entries: Iterable[Embedding]) -> set[str]:
    """The files that some entries name."""
    return {file for entry in entries for file in (entry.sidecar, entry.grams_sidecar) if file}


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
