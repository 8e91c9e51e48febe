"""Folders of data: ``datasets`` finds the files of each split, and nothing stays in its cache.

CSV, TSV, JSON and parquet are read as single files are, and images in folders of classes, or beside a
``metadata.csv``, as paths. Other formats are read by ``datasets`` into memory.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pimerge.core.hf_loading import rows_builder
from pimerge.tasks.table_files import ENDINGS, ending_of, read_files
from pimerge.tasks.text_format import TextFormat

if TYPE_CHECKING:
    import datasets

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NAME = "file_name"


@dataclass(frozen=True)
class DataFolder:
    """A folder of data.

    Attributes:
        path: the folder.
        subset: configuration named in the folder's README.md.
    """

    path: Path
    subset: str | None

    def load(self, split: str, named: Sequence[str]) -> Mapping[str, datasets.Dataset] | datasets.Dataset:
        """Read splits: split → rows for the splits in ``named`` that exist, or all if there are none of them.

        Formats that only ``datasets`` reads give the rows of ``split`` alone.
        """
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

        with _plainly_named(self.path) as (folder, work):
            builder = rows_builder(folder, name=self.subset, cache_dir=str(work))
            here = {
                str(name): [self.path / Path(file).relative_to(folder.resolve()) for file in files]
                for name, files in (builder.config.data_files or {}).items()
            }
            files = {name: found for name, found in here.items() if name in named} or here
            every = [path for found in files.values() for path in found]
            if every and all(ending_of(path.name) in ENDINGS for path in every):
                form = TextFormat(delimiter=_delimiter(builder.config))
                return {name: read_files(found, form) for name, found in files.items()}
            if isinstance(builder, ImageFolder) and not any(path.suffix.lower() in _archives() for path in every):
                return _images(here, files)
            builder.download_and_prepare()
            return builder.as_dataset(split=split, in_memory=True)


@contextmanager
def _plainly_named(path: Path) -> Iterator[tuple[Path, Path]]:
    """The folder, by a path that ``datasets`` does not take for a pattern, and a folder for what it writes."""
    path = path.resolve()
    with TemporaryDirectory(prefix="pimerge-data-") as name:
        work = Path(name).resolve()
        folder = path
        if glob.escape(str(path)) != str(path) or "::" in str(path):
            folder = work / "folder"
            for file in path.rglob("*"):
                if file.is_file():
                    link = folder / file.relative_to(path)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file)
        yield folder, work / "cache"


def _delimiter(config: Any) -> str | None:
    """The delimiter in the folder's README.md, or a tab for TSV; None for a comma, which is usual."""
    found: str = getattr(config, "sep", ",")
    return None if found == "," else found


def _archives() -> tuple[str, ...]:
    return (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def _images(every: Mapping[str, Sequence[Path]], wanted: Mapping[str, Sequence[Path]]) -> dict[str, datasets.Dataset]:
    """Images and their classes: columns of ``metadata.csv``, or the names of the folders that hold the images."""
    paths = [path for found in every.values() for path in found]
    if any(path.name in _METADATA for path in paths):
        return {split: _described(found) for split, found in wanted.items()}
    depths, names = {len(path.parts) for path in paths}, sorted({path.parent.name for path in paths})
    labelled = len(names) > 1 and len(depths) == 1
    return {split: _classified(found, names if labelled else []) for split, found in wanted.items()}


def _classified(paths: Sequence[Path], names: Sequence[str]) -> datasets.Dataset:
    import datasets

    features: dict[str, Any] = {"image": datasets.Image()}
    columns: dict[str, list[Any]] = {"image": [str(path.absolute()) for path in paths]}
    if names:
        features["label"] = datasets.ClassLabel(names=list(names))
        columns["label"] = [path.parent.name for path in paths]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _described(paths: Sequence[Path]) -> datasets.Dataset:
    import datasets

    parts = []
    for path in paths:
        if path.name in _METADATA:
            rows = read_files([path], TextFormat())
            images = [name and str((path.parent / name).absolute()) for name in rows[_NAME]]
            features = datasets.Features({"image": datasets.Value("string")})
            beside = datasets.Dataset.from_dict({"image": images}, features=features)
            parts.append(
                datasets.concatenate_datasets(
                    [beside.cast_column("image", datasets.Image()), rows.remove_columns(_NAME)], axis=1
                )
            )
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
