"""Read rows in JSON: one object per line, or a list of objects. Texts stay texts, also if they look like dates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pimerge.core.errors import PimergeError
from pimerge.tasks.row_errors import ranges

if TYPE_CHECKING:
    import pyarrow

_WORDS = {str: "texts", bool: "true or false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}
_HINT = "write one object per line (JSON lines), or a list of objects"


def read_json(file: TextIO, name: str) -> pyarrow.Table:
    """Read a table; which of the two forms a file has is seen from its content.

    Args:
        file: the open file, whose lines end in ``\\n``.
        name: name of the file, for messages.
    """
    first = next((line for line in file if line.strip()), "")
    if not first.strip():
        raise PimergeError(f"'{name}' is empty", _HINT)
    if not _is_object(first):
        return _table(_document(first + file.read(), name), name)
    rest = [line for line in file if line.strip()]
    if not rest:
        return _table(_document(first, name), name)
    return _table(_lines([first, *rest], name), name)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(lines: Iterable[str], name: str) -> list[Mapping[str, Any]]:
    """One object per line; all other lines are one error."""
    rows: list[Mapping[str, Any]] = []
    wrong, reason = [], ""
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
                continue
            said = f"it holds {_shown(row)}"
        except (ValueError, RecursionError) as error:
            said = str(error)
        wrong.append(number)
        reason = reason or said
    if wrong:
        raise PimergeError(
            f"{len(wrong)} rows of '{name}' are not JSON objects: {ranges(wrong)} (from 0); the first: {reason}", _HINT
        )
    return rows


def _document(text: str, name: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a file that is one JSON value."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PimergeError(f"'{name}' is not valid JSON: {error}", _HINT) from error
    if isinstance(found, dict):
        if ".json" in Path(name).suffixes:  # in JSON lines, an object is a row
            _refuse_columns(found, name)
        return [found]
    if not isinstance(found, list):
        raise PimergeError(f"'{name}' holds {_shown(found)}", _HINT)
    if wrong := [number for number, row in enumerate(found) if not isinstance(row, dict)]:
        raise PimergeError(
            f"{len(wrong)} rows of '{name}' are not JSON objects: {ranges(wrong)} (from 0); "
            f"the first: it holds {_shown(found[wrong[0]])}",
            _HINT,
        )
    return found


def _refuse_columns(found: Mapping[str, Any], name: str) -> None:
    """Refuse one object that holds all rows in a field, or all values of each column."""
    for field, value in found.items():
        rows = isinstance(value, list) and value
        if rows and (all(isinstance(row, dict) for row in value) or (field == "data" and "columns" in found)):
            raise PimergeError(
                f"'{name}' is one object whose field '{field}' holds the rows",
                f"save the list in '{field}' alone: {_HINT}",
            )
    values = list(found.values())
    by_index = all(isinstance(value, dict) for value in values) and len({tuple(value) for value in values}) == 1
    if values and by_index and len(values) > 1:
        raise PimergeError(
            f"'{name}' is columnar JSON: one object with the values of each column ({', '.join(found)})", _HINT
        )


def _table(rows: Sequence[Mapping[str, Any]], name: str) -> pyarrow.Table:
    """Columns of all keys; a key that a row lacks is null there."""
    import pyarrow

    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = [_column([row.get(key) for row in rows], key, name) for key in names]
    return pyarrow.table(columns, names=names)


def _column(values: list[Any], column: str, name: str) -> pyarrow.Array:
    """An Arrow column; whole numbers among texts, and numbers beyond 64 bits, become texts."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except UnicodeEncodeError as error:
        raise PimergeError(
            f"the column '{column}' of '{name}' holds text that cannot be stored: {error.reason}",
            "half of a surrogate pair is no character: fix it or leave the row out",
        ) from error
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError) as error:
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {str, int}:
            return _column([_text(value) for value in values], column, name)
        inner = {type(item) for value in values if isinstance(value, list) for item in value if item is not None}
        if kinds == {list} and int in inner and inner <= {str, int}:
            return _column([value and [_text(item) for item in value] for value in values], column, name)
        words = " and ".join(sorted({_WORDS[kind] for kind in kinds}))
        raise PimergeError(
            f"the column '{column}' of '{name}' mixes {words if len(kinds) > 1 else f'{words} of several forms'}",
            "give all rows values of one form in it",
        ) from error


def _text(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
