"""Infer splits, type of task, columns and labels from rows in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.core.errors import PimergeError, nearest
from pimerge.tasks.task_type import TASK_TYPES

if TYPE_CHECKING:
    import datasets

SplitRows: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
"""The rows of one split."""


def rows_by_split(rows: SplitRows | Mapping[str, SplitRows], test: SplitRows | None) -> dict[str, datasets.Dataset]:
    """Map each split to its rows; rows without a split are the training rows."""
    named = dict(rows) if isinstance(rows, Mapping) else {"train": rows}
    if test is not None:
        named["test"] = test
    if not named:
        raise PimergeError("there are no rows", "pass a datasets.Dataset or a list of dicts")
    return {split: _table(found, split) for split, found in named.items()}


def _table(rows: SplitRows, split: str) -> datasets.Dataset:
    import datasets
    import pyarrow

    if isinstance(rows, datasets.Dataset):
        return rows
    where = f"the rows of the split '{split}'"
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise PimergeError(f"{where} are a {type(rows).__name__}", "expected a datasets.Dataset or a list of dicts")
    if not rows:
        raise PimergeError(f"{where} are empty", "give at least one")
    try:
        return datasets.Dataset.from_list([dict(row) for row in rows])
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PimergeError(f"{where} do not make a table: {reason}", "give every row the same columns") from error


def infer_type(columns: Sequence[str]) -> str:
    """The only type of task whose usual columns are all present.

    >>> infer_type(["sentence", "label"])
    'text-classification'
    """
    recognised = [kind for kind in TASK_TYPES if kind.usual_columns]
    fitting = [
        kind.name for kind in recognised if all(set(names) & set(columns) for names in kind.usual_columns.values())
    ]
    if len(fitting) == 1:
        return fitting[0]
    fit = f"fit several types of task: {', '.join(fitting)}" if fitting else "do not determine the type of task"
    raise PimergeError(
        f"the columns {', '.join(columns)} {fit}",
        f"pass type=…, one of {', '.join(TASK_TYPES.names())}, and columns={{role: column}} if they have other names",
    )


def infer_columns(kind: str, columns: Sequence[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """Map each role to its column, if the column's name differs from the role.

    >>> infer_columns("text-classification", ["sentence", "y"], {"label": "y"})
    {'text': 'sentence', 'label': 'y'}
    """
    found = {}
    for role, known in TASK_TYPES.load(kind).usual_columns.items():
        if role not in columns and (there := [name for name in known if name in columns]):
            found[role] = there[0]
    return found | dict(given or {})


def infer_labels(splits: Mapping[str, datasets.Dataset], column: str) -> list[str]:
    """The names of the classes: from a ``ClassLabel``, or the distinct texts of the column in alphabetical order.

    >>> import datasets
    >>> infer_labels({"train": datasets.Dataset.from_dict({"label": ["b", "a", "b"]})}, "label")
    ['a', 'b']
    """
    hint = "name the classes: labels=['…', '…']"
    holding = {split: rows for split, rows in splits.items() if column in rows.column_names}
    if not holding:
        columns = next(iter(splits.values())).column_names
        raise PimergeError(f"the rows have no column '{column}' for the label", nearest(column, columns))
    for rows in holding.values():
        if names := class_names_of(rows.features[column]):
            return names
    values = [value for rows in holding.values() for value in rows[column]]
    found = {label for value in values for label in (value if isinstance(value, list) else [value])}
    if not all(isinstance(label, str) for label in found):
        raise PimergeError(f"the labels in the column '{column}' are not names", hint)
    if len(found) < 2:
        raise PimergeError(f"all labels in the column '{column}' are '{''.join(found)}'", hint)
    return sorted(found)


def class_names_of(feature: Any) -> list[str]:
    """The class names of a ``ClassLabel`` column, or of a list of them; empty for any other column."""
    names = getattr(getattr(feature, "feature", feature), "names", None) or []
    return list(names) if len(names) > 1 else []
