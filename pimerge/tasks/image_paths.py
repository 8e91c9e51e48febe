"""Columns of a data file that hold paths of images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_bytes, sha256_files
from pimerge.tasks.data import TaskData
from pimerge.tasks.row_errors import some


def holds_paths(rows: Any, column: str) -> bool:
    """Whether a column of a ``datasets.Dataset`` holds strings, which are paths if the column is for images."""
    return column in rows.features and getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def with_images(rows: Any, column: str, folders: Sequence[Path], where: str) -> Any:
    """Replace paths by images, which ``datasets`` decodes when they are read.

    Args:
        column: column with the paths.
        folders: folders of the data files, to which relative paths refer.
        where: description of the rows, for messages.
    """
    import datasets

    if not len(rows):  # every row had another problem
        return rows
    held = [None if path is None else str(path) for path in resolved(rows[column], folders, where)]
    return rows.remove_columns(column).add_column(column, held).cast_column(column, datasets.Image())


def with_encoded_images(rows: Any, column: str) -> Any:
    """Decode images that a column holds as the bytes of their files, alone or in the form of ``datasets``."""
    import datasets
    import pyarrow

    kind = rows.data.schema.field(column).type
    fields = {field.name for field in kind} if pyarrow.types.is_struct(kind) else set()
    encoded = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or "bytes" in fields
    if not encoded or isinstance(rows.features[column], datasets.Image):
        return rows
    return rows.cast_column(column, datasets.Image())


def resolved(names: Sequence[str | None], folders: Sequence[Path], where: str) -> list[Path | None]:
    """Make the paths of a column absolute; relative paths are an error if data files are in several folders."""
    relative = [place for place, name in enumerate(names) if name is not None and not Path(name).is_absolute()]
    if relative and len(folders) > 1:
        raise PimergeError(
            f"{where} has paths of images in {len(relative)} rows ({some(relative)}, from 0) that are relative to its "
            f"data files, which lie in {len(folders)} folders",
            "put the data files of a split into one folder, or name images by absolute paths",
        )
    return [None if name is None else (folders[0] / name).absolute() for name in names]


def content_hash(paths: Sequence[Path | None]) -> str:
    """Hash the content of a split's images, in order; a missing image counts as empty."""
    there = sorted({path for path in paths if path is not None and path.is_file()})
    known = dict(zip(there, sha256_files(there), strict=True))
    return sha256_bytes("\n".join(known.get(path, "") if path else "" for path in paths).encode())


def hashes_of_named(data: TaskData, column: str, splits: Sequence[str]) -> list[str]:
    """Hash the images of each split that holds paths of images."""
    found = []
    for split in sorted(set(splits)):
        with suppress(PimergeError):  # a task may lack a split
            rows, folders = data.load(split), data.folders(split)
            if folders and holds_paths(rows, column):
                found.append(content_hash(resolved(rows[column], folders, split)))
    return found
