"""Read local data files into memory; without a cache on disk, the rows are always those of the file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import sha256_bytes, sha256_file
from pimerge.tasks.delimited import read_delimited
from pimerge.tasks.json_rows import read_json
from pimerge.tasks.text_format import TextFormat

if TYPE_CHECKING:
    import datasets
    import pyarrow

ENDINGS = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson")
"""Endings of data files; all but parquet may be followed by ``.gz``."""
_JSON = (".json", ".jsonl", ".ndjson")
_TEXT = ".txt"
_COMPRESSED = ".gz"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def ending_of(name: str) -> str:
    """The ending that says a file's format, without ``.gz``.

    >>> ending_of("train.CSV.gz"), ending_of("d.parquet.gz")
    ('.csv', '.parquet.gz')
    """
    path = Path(name.lower())
    inner = Path(path.stem).suffix
    if path.suffix == _COMPRESSED and inner != ".parquet":
        return inner
    return inner + path.suffix if path.suffix == _COMPRESSED else path.suffix


def is_delimited(name: str) -> bool:
    """Whether a file is CSV or TSV, or another text file whose delimiter the task names."""
    return ending_of(name) in (".csv", ".tsv", _TEXT)


@dataclass(frozen=True)
class DataFiles:
    """The files of each split.

    Attributes:
        files: split → its files.
        options: delimiter, encoding and quoting of text files.
        where: path of ``task.json``, for messages.
    """

    files: Mapping[str, Sequence[Path]]
    options: Mapping[str, Any]
    where: str

    def load(self, split: str, named: Sequence[str]) -> Mapping[str, datasets.Dataset]:
        """Read the splits in ``named`` that exist, or all if there are none of them."""
        text = TextFormat.of(self.options, f"'{self.where}'")
        self._check()
        wanted = {name: paths for name, paths in self.files.items() if name in named} or self.files
        return {name: read_files(paths, text) for name, paths in wanted.items()}

    def _check(self) -> None:
        """Check names of files and their endings; all problems are raised at once."""
        problems = Problems()
        paths = dict.fromkeys(path for group in self.files.values() for path in group)
        for path in paths:
            if not path.is_file():
                problems.add(f"there is no data file '{path}'")
            elif ending_of(path.name) not in (ENDINGS if "delimiter" not in self.options else (*ENDINGS, _TEXT)):
                problems.add(
                    f"'{path.name}' ends in '{ending_of(path.name)}'",
                    "expected " + ", ".join(ENDINGS) + ", or .txt with a delimiter in data",
                )
        if self.options and not any(is_delimited(path.name) or self.options.keys() == {"encoding"} for path in paths):
            problems.add(f"data names {' and '.join(self.options)}, and no file is CSV or TSV", "leave it out")
        if empty := [split for split, group in self.files.items() if not group]:
            problems.add(f"the split '{empty[0]}' names no file")
        problems.raise_any("the data does not fit")


def read_files(paths: Sequence[Path], text: TextFormat) -> datasets.Dataset:
    """Read the files of a split, one after the other, which must have the same columns."""
    import datasets

    tables = [_read(path, sha256_file(path), text) for path in paths]
    first = tables[0].column_names
    for path, table in zip(paths, tables, strict=True):
        if set(table.column_names) != set(first):
            raise PimergeError(
                f"'{path}' has the columns {', '.join(table.column_names)}, and '{paths[0]}' has {', '.join(first)}",
                "give all files of a split the same columns",
            )
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(_aligned(tables))


def _aligned(tables: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """Make a column texts if it has whole numbers in some files and texts in others."""
    import datasets

    found = list(tables)
    for column in tables[0].column_names:
        features = [table.features[column] for table in tables]
        dtypes = {str(feature.dtype).rstrip("0123456789") for feature in features if type(feature) is datasets.Value}
        if all(type(feature) is datasets.Value for feature in features) and "string" in dtypes <= {
            "int",
            "uint",
            "string",
        }:
            found = [table.cast_column(column, datasets.Value("string")) for table in found]
    return found


@lru_cache(maxsize=2)  # a task's train and test splits are read several times
def _read(path: Path, sha256: str, text: TextFormat) -> datasets.Dataset:
    import datasets

    fingerprint = sha256_bytes(f"{sha256} {path} {text}".encode())[:32]  # otherwise datasets hashes all values
    return datasets.Dataset(datasets.table.InMemoryTable(_table(path, text)), fingerprint=fingerprint)


def _table(path: Path, text: TextFormat) -> pyarrow.Table:
    ending = ending_of(path.name)
    if ending == ".parquet":
        return _parquet(path)
    with _opened(path, text) as file:
        if ending in _JSON:
            return read_json(file, str(path))
        return read_delimited(file, str(path), text.delimiter_of(ending), text.quoting_of(ending))


def _parquet(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        return _without_codes(table)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise PimergeError(f"'{path}' cannot be read as parquet: {reason}", "write or download it again") from error


def _without_codes(table: pyarrow.Table) -> pyarrow.Table:
    """Replace dictionary codes, as pandas' categories are stored, by their values."""
    import pyarrow

    for place, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


@contextmanager
def _opened(path: Path, text: TextFormat) -> Iterator[TextIO]:
    """Open a text file; what cannot be read or decoded becomes a message."""
    try:
        with _binary(path) as file:
            start = file.read(3)
        encoding = text.encoding or ("utf-16" if start[:2] in _UTF16 else "utf-8-sig")
        opening = gzip.open if path.suffix.lower() == _COMPRESSED else open
        newline = "" if is_delimited(path.name) else "\n"
        with opening(path, "rt", encoding=encoding, newline=newline) as opened:
            yield opened
    except UnicodeDecodeError as error:
        named = text.encoding or "utf-8"
        raise PimergeError(
            f"'{path}' is not encoded in {named}{_undecodable(path, text)}",
            'save it as UTF-8, or name its encoding in data, such as "encoding": "latin-1"',
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise PimergeError(f"'{path}' cannot be read: {error}", "write or download it again") from error


def _binary(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == _COMPRESSED else path.open("rb")  # type: ignore[return-value]


def _undecodable(path: Path, text: TextFormat) -> str:
    """Where the first byte is that cannot be decoded."""
    with suppress(OSError, EOFError, zlib.error), _binary(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(text.encoding or "utf-8")
            except UnicodeDecodeError as error:
                return f": line {number} has the byte 0x{line[error.start]:02x}"
    return ""
