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
from pimerge.core.hf_loading import hub_rows
from pimerge.tasks.data_folders import DataFolder
from pimerge.tasks.table_files import DataFiles
from pimerge.tasks.text_format import OPTIONS

if TYPE_CHECKING:
    import datasets

    from pimerge.tasks.schema import TaskFile

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
        """Read one split, named in the slicing syntax of ``datasets`` (``train[:80%]``).

        Local files are read into memory, and no copy of them stays in a cache.
        """
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        where = f"the split '{split}' of '{self.path}'"
        problems, source = Problems(), self._source()
        with problems.collected(f"{where} cannot be read: "):
            try:
                if source is None:
                    return self._from_hub(split)
                found = source.load(split, re.findall(r"\w+", split))
                return part_of(found, split) if isinstance(found, Mapping) else found
            except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
                reason = str(error.__cause__ or error).strip().partition("\n")[0]
                if "corresponds to no data" in reason:  # datasets' message for a split without rows
                    raise PimergeError(f"the split '{split}' is empty", NOT_EMPTY) from error
                raise PimergeError(reason, "check 'data' and 'splits' in task.json") from error
        problems.raise_any(f"{where} cannot be read")
        raise AssertionError

    def _from_hub(self, split: str) -> datasets.Dataset:
        return hub_rows(str(self.file.data), split, name=self.file.subset, revision=self.file.revision)

    def _source(self) -> DataFiles | DataFolder | None:
        """The local files or folder; None for a data set of the Hub."""
        data, folder = self.file.data, self.path.parent
        if data is None:
            raise PimergeError(
                f"'{self.path}' names no data, so there are no rows to read",
                "its rows were in memory: pass them again with Task.from_rows, or name a file as 'data'",
            )
        if isinstance(data, str) and not (folder / data).is_file():
            return DataFolder(folder / data, self.file.subset) if (folder / data).is_dir() else None
        files = {split: [folder / name for name in names] for split, names in self._files().items()}
        return DataFiles(files, self._options(), str(self.path))

    def _files(self) -> dict[str, list[str]]:
        """The names of each split's files; a single file is the split ``train``."""
        data = self.file.data
        if not isinstance(data, dict):
            return {} if data is None else {"train": [data]}
        named = {split: names for split, names in data.items() if split not in OPTIONS}
        return {split: [names] if isinstance(names, str) else names for split, names in named.items()}

    def _options(self) -> dict[str, Any]:
        """The format of text files."""
        data = self.file.data
        return {name: value for name, value in data.items() if name in OPTIONS} if isinstance(data, dict) else {}

    def has(self, split: str) -> bool:
        """Whether ``data`` is a mapping that contains the split."""
        return isinstance(self.file.data, dict) and split in self._files()

    def folders(self, split: str) -> list[Path]:
        """The folders of the split's files; empty for a data set of the Hub."""
        data, here = self.file.data, self.path.parent
        if data is None:
            return []
        if isinstance(data, str):
            path = here / data
            return [path] if path.is_dir() else [path.parent] if path.is_file() else []
        files = self._files()
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
        hashes = {
            split: [sha256_file(folder / name) if (folder / name).is_file() else name for name in names]
            for split, names in self._files().items()
        }
        return hashes | self._options()

    def fields_for(self, folder: Path) -> dict[str, Any]:
        """The field ``data``, with paths relative to another folder."""
        data = self.file.data

        def moved(name: str) -> str:
            path = self.path.parent / name
            return relative_to(path, folder) if path.exists() else name

        if not isinstance(data, dict):
            return {} if data is None else {"data": moved(data)}
        files = {split: [moved(name) for name in names] for split, names in self._files().items()}
        as_named = {split: names[0] if isinstance(data[split], str) else names for split, names in files.items()}
        return {"data": as_named | self._options()}


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
        problems = Problems()
        with problems.collected(f"the rows of '{self.name}': "):
            return part_of(self.splits, split)
        problems.raise_any(f"the rows of '{self.name}' do not fit")
        raise AssertionError

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


def part_of(splits: Mapping[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """Take a split, or parts of splits in the slicing syntax of ``datasets``."""
    import datasets

    if split in splits:
        return splits[split]
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        reason = f"there is no split '{split}'" if "Unknown split" in str(error) else f"'{split}': {error}"
        raise PimergeError(reason, nearest(split, list(splits))) from error
    places = [(splits[part.splitname], range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets([rows.select(within if within else []) for rows, within in places])


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
