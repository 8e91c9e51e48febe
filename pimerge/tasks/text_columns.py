"""Columns of texts: what is text stays what it is, and what is none is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.row_errors import RowProblems, ranges


def with_texts(table: Any, role: str, column: str, problems: RowProblems) -> Any:
    """Make a column of a ``datasets.Dataset`` texts: whole numbers and UTF-8 bytes are, anything else is an error.

    Args:
        role: role of the column, for messages.
        problems: where rows with bytes that are not UTF-8 are recorded.
    """
    import datasets
    import pyarrow

    kind = table.data.schema.field(column).type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind):
        return table
    values = table[column][:]
    if pyarrow.types.is_integer(kind) and not getattr(table.features[column], "names", None):
        texts = [None if value is None else str(value) for value in values]
    elif pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        texts = [_decoded(value, place, role, problems) for place, value in enumerate(values)]
    else:
        shown = next((value for value in values if value is not None), None)
        raise PimergeError(
            f"the column '{column}' of {problems.where} holds {words_of(kind)}, such as {shown_as_json(shown)}, "
            f"and the {role} must be text",
            _hint(kind, len(values)),
        )
    return table.remove_columns(column).add_column(column, texts, feature=datasets.Value("string"))


def with_numbers(table: Any, columns: Sequence[str], where: str) -> Any:
    """Turn the texts of some columns into numbers: whole ones if all are whole; an empty cell stays null."""
    problems = Problems()
    for column in columns:
        if column not in table.column_names:
            problems.add(f"{where} has no column '{column}', which numbers names", nearest(column, table.column_names))
        elif getattr(table.features[column], "dtype", "") in ("string", "large_string"):
            with problems.collected():
                values = _numbers(table[column][:], column, where)
                table = table.remove_columns(column).add_column(column, values)
    problems.raise_any(f"the columns of numbers of {where} do not fit")
    return table


def _numbers(texts: Sequence[str | None], column: str, where: str) -> list[int | float | None]:
    found: list[int | float | None] = []
    wrong: dict[int, str] = {}
    for place, text in enumerate(texts):
        try:
            found.append(None if text is None else int(text) if text.strip().lstrip("+-").isdigit() else float(text))
        except ValueError:
            wrong[place] = str(text)
    if wrong:
        shown = ", ".join(repr(text) for text in list(dict.fromkeys(wrong.values()))[:5])
        raise PimergeError(
            f"the column '{column}' of {where} holds {len(wrong)} texts that are no numbers: {shown} "
            f"(rows {ranges(list(wrong))}, from 0)",
            "fix them, or leave the column out of numbers",
        )
    return found


def _decoded(value: bytes | None, place: int, role: str, problems: RowProblems) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        with problems.row(place):
            raise PimergeError(f"the {role} is no UTF-8 text ({error.reason})", "save it as UTF-8 text") from error
    return None


def _hint(kind: Any, rows: int) -> str:
    import pyarrow

    if pyarrow.types.is_list(kind) and rows == 1:
        return "one object with a list per column is columnar JSON: write one object per row"
    if pyarrow.types.is_struct(kind):
        return "name a column that holds the text itself, or save one of the parts as a column of its own"
    if pyarrow.types.is_list(kind):
        return "join the parts of each row to one text"
    return "save them as texts, in the spelling that the model is to read"


def words_of(kind: Any) -> str:
    """What a column of an Arrow type holds, in words."""
    import pyarrow

    for test, words in (
        (pyarrow.types.is_struct, "objects"),
        (pyarrow.types.is_nested, "lists"),
        (pyarrow.types.is_boolean, "true and false"),
        (pyarrow.types.is_floating, "numbers with fractions"),
        (pyarrow.types.is_integer, "whole numbers"),
        (pyarrow.types.is_temporal, "dates or times"),
        (pyarrow.types.is_string, "texts"),
        (pyarrow.types.is_large_string, "texts"),
    ):
        if test(kind):
            return words
    return f"values of the type {kind}"


def shown_as_json(value: Any, most: int = 60) -> str:
    """A value as JSON, cut to a few characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[:most] + "…"
