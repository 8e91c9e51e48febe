"""Sources of a task's rows: files and Hub data sets named in ``task.json``, or rows in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.core.files import relative_to, sha256_bytes, sha256_file

if TYPE_CHECKING:
    import datasets

    from pimerge.tasks.schema import TaskFile

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
NOT_EMPTY = "give it at least one example"


@dataclass(frozen=True)
class NamedData:
    """Files or a Hub data set named in ``task.json``.

    Attributes:
        path: path of ``task.json``; paths in it are relative to its folder.
        file: content of ``task.json``.
    """

    path: Path
    file: TaskFile

    def load(self, split: str) -> datasets.Dataset:
        """Read one split, named in the slicing syntax of ``datasets`` (``train[:80%]``)."""
        import datasets

        source, options = self._source()
        files = options.get("data_files", {})
        named = {name: paths for name, paths in files.items() if name in re.findall(r"\w+", split)}
        if named:  # other splits may have other columns
            options["data_files"] = named
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            return datasets.load_dataset(source, split=split, **options)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            if "corresponds to no data" in reason:  # datasets' message for a split without rows
                raise PimergeError(f"the split '{split}' of '{self.path}' is empty", NOT_EMPTY) from error
            splits = [str(name) for name in files] or ["train", "test"]
            hint = nearest(split, splits) if "split" in reason.lower() else "check 'data' and 'splits' in task.json"
            raise PimergeError(f"the split '{split}' of '{self.path}' cannot be read: {reason}", hint) from error

    def _source(self) -> tuple[str, dict[str, Any]]:
        """The arguments of ``datasets.load_dataset``."""
        data, folder = self.file.data, self.path.parent
        if data is None:
            raise PimergeError(
                f"'{self.path}' names no data, so there are no rows to read",
                "its rows were in memory: pass them again with Task.from_rows, or name a file as 'data'",
            )
        if isinstance(data, str) and not (folder / data).is_file():
            if (folder / data).is_dir():
                return str(folder / data), {"name": self.file.subset}
            return data, {"name": self.file.subset, "revision": self.file.revision}
        names = {"train": [data]} if isinstance(data, str) else self._files(data)
        problems = Problems()
        endings = set()
        for name in (name for group in names.values() for name in group):
            ending = Path(name).suffix.lower()
            endings.add(ending)
            if not (folder / name).is_file():
                problems.add(f"'{self.path}': there is no data file '{folder / name}'")
            elif ending not in _BUILDERS:
                problems.add(f"'{self.path}': '{name}' ends in '{ending}'", "expected " + ", ".join(_BUILDERS))
        problems.raise_any(f"the data of '{self.path}' does not fit")
        formats = {(_BUILDERS[ending], ending == ".tsv") for ending in endings}
        if len(formats) != 1:
            raise PimergeError(
                f"'{self.path}': data mixes {', '.join(sorted(endings))}", "use one format for all splits"
            )
        files = {split: [str((folder / name).resolve()) for name in group] for split, group in names.items()}
        builder, by_tabs = formats.pop()
        return builder, {"data_files": files, **({"sep": "\t"} if by_tabs else {})}

    @staticmethod
    def _files(data: Mapping[str, str | list[str]]) -> dict[str, list[str]]:
        return {split: [files] if isinstance(files, str) else files for split, files in data.items()}

    def has(self, split: str) -> bool:
        """Whether ``data`` is a mapping that contains the split."""
        return isinstance(self.file.data, dict) and split in self.file.data

    def folders(self, split: str) -> list[Path]:
        """The folders of the split's files; empty for a data set of the Hub."""
        data, here = self.file.data, self.path.parent
        if data is None:
            return []
        if isinstance(data, str):
            path = here / data
            return [path] if path.is_dir() else [path.parent] if path.is_file() else []
        files = self._files(data)
        names = files.get(split.partition("[")[0]) or [name for group in files.values() for name in group]
        return sorted({(here / name).parent for name in names})

    def content(self) -> Any:
        """A JSON value that identifies the content, independent of its location.

        It holds hashes of files by split or by path in the data's folder, the id of a Hub data set, or hashes of rows.
        """
        data, folder = self.file.data, self.path.parent
        if data is None:
            return self.file.rows
        if isinstance(data, str):
            path = folder / data
            if path.is_dir():
                files = (file for file in path.rglob("*") if file.is_file())
                return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
            return sha256_file(path) if path.is_file() else data
        return {
            split: [sha256_file(folder / name) if (folder / name).is_file() else name for name in names]
            for split, names in self._files(data).items()
        }

    def fields_for(self, folder: Path) -> dict[str, Any]:
        """The field ``data``, with paths relative to another folder."""
        data = self.file.data

        def moved(name: str) -> str:
            path = self.path.parent / name
            return relative_to(path, folder) if path.exists() else name

        if not isinstance(data, dict):
            return {} if data is None else {"data": moved(data)}
        return {
            "data": {
                split: moved(value) if isinstance(value, str) else [moved(name) for name in value]
                for split, value in data.items()
            }
        }


@dataclass(frozen=True)
class RowsInMemory:
    """Rows in memory.

    Attributes:
        name: name of the task, for messages.
        splits: split → its rows.
    """

    name: str
    splits: Mapping[str, datasets.Dataset]

    def load(self, split: str) -> datasets.Dataset:
        """Read a split, or parts of splits in slicing syntax."""
        import datasets

        if split in self.splits:
            return self.splits[split]
        lengths = {name: len(rows) for name, rows in self.splits.items()}
        try:
            parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise PimergeError(
                f"the rows of '{self.name}' have no split '{split}'", nearest(split, list(self.splits))
            ) from error
        return datasets.concatenate_datasets(
            [self.splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
        )

    def has(self, split: str) -> bool:
        """Whether a split has rows."""
        return split in self.splits

    def folders(self, split: str) -> list[Path]:
        """No folders: paths of images are resolved when the task is made."""
        return []

    def content(self) -> Any:
        """Hash the rows of each split."""
        return {split: _hash(rows) for split, rows in self.splits.items()}

    def fields_for(self, folder: Path) -> dict[str, Any]:
        """The field ``rows``: hashes that identify the task."""
        return {"rows": self.content()}


TaskData: TypeAlias = NamedData | RowsInMemory
"""The source of a task's rows."""


def _hash(rows: datasets.Dataset) -> str:
    """SHA-256 of the values in rows; an image counts by its bytes, not its path."""
    import datasets

    columns = sorted(rows.column_names)
    images = {name for name in columns if isinstance(rows.features[name], datasets.Image)}
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    digest = sha256(json.dumps({name: getattr(rows.features[name], "names", None) for name in columns}).encode())
    for row in rows:
        plain = [_image_hash(row[name]) if name in images else row[name] for name in columns]
        digest.update(json.dumps(plain, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _image_hash(image: Mapping[str, Any] | None) -> str:
    if image is None:
        return ""
    if image["bytes"] is not None:
        return sha256_bytes(image["bytes"])
    path = Path(image["path"])
    return sha256_file(path) if path.is_file() else ""


def _plain(value: Any) -> str:
    return sha256_bytes(value) if isinstance(value, bytes) else str(value)
