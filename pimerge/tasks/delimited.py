"""Read CSV and TSV. Every cell is text: ``007``, ``NA`` and ``null`` stay what they are; an empty cell is null."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from pimerge.core.errors import PimergeError
from pimerge.tasks.row_errors import ranges

if TYPE_CHECKING:
    import pyarrow

_LONGEST_CELL = 2**31 - 1
_ROWS_AT_ONCE = 50_000
_OTHER_DELIMITERS = ",;\t|"


def read_delimited(file: TextIO, name: str, delimiter: str, quoting: int) -> pyarrow.Table:
    """Read a table whose first line names the columns.

    Args:
        file: the open file, without translation of line ends.
        name: name of the file, for messages.
        delimiter: the character between cells.
        quoting: a constant of :mod:`csv`.
    """
    import pyarrow

    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    try:
        header = next(reader, None)
        if not header:
            raise PimergeError(f"'{name}' is empty", "its first line names the columns")
        _check_header(header, name)
        schema = pyarrow.schema([(column, pyarrow.string()) for column in header])
        parts = [
            pyarrow.Table.from_arrays(_columns(rows, header), schema=schema) for rows in _batches(reader, header, name)
        ]
        return pyarrow.concat_tables(parts) if parts else schema.empty_table()
    except csv.Error as error:
        raise PimergeError(
            f"the quotes in '{name}' do not match: line {reader.line_num}: {error}",
            'double a quote inside a quoted cell, or say that quotes enclose no cells: "quoting": "none" in data',
        ) from error


def _check_header(header: Sequence[str], name: str) -> None:
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise PimergeError(
            f"the first line of '{name}' names the column '{twice[0]}' {Counter(header)[twice[0]]} times",
            "give each column a name of its own; the first line of the file must name the columns",
        )


def _batches(reader: Iterator[list[str]], header: Sequence[str], name: str) -> Iterator[list[list[str]]]:
    """The rows in parts; rows with another number of cells than the header raise one error."""
    rows: list[list[str]] = []
    wrong: dict[int, int] = {}
    number = 0
    for row in reader:
        if not row:  # an empty line
            continue
        if len(row) == len(header):
            rows.append(row)
        else:
            wrong[number] = len(row)
        number += 1
        if len(rows) == _ROWS_AT_ONCE:
            yield rows
            rows = []
    if wrong:
        cells = ", ".join(str(count) for count in sorted(set(wrong.values())))
        raise PimergeError(
            f"{len(wrong)} of {number} rows of '{name}' have {cells} cells, and its first line has {len(header)}: "
            f"rows {ranges(sorted(wrong))} (from 0)",
            "quote cells that contain the delimiter, or name the file's own delimiter or quoting in data",
        )
    if rows:
        yield rows


def _columns(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[pyarrow.Array]:
    import pyarrow

    return [pyarrow.array([row[place] or None for row in rows], pyarrow.string()) for place in range(len(header))]


def delimiter_hint(columns: Sequence[str]) -> str:
    """What to do if the only column of a file looks like a line with another delimiter; empty otherwise.

    >>> delimiter_hint(["text;label"])
    'name the delimiter in data: "delimiter": ";"'
    """
    if len(columns) == 1:
        for delimiter in _OTHER_DELIMITERS:
            if delimiter in columns[0]:
                shown = "\\t" if delimiter == "\t" else delimiter
                return f'name the delimiter in data: "delimiter": "{shown}"'
    return ""
