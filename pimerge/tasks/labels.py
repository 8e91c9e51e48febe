"""Map the labels in the data to class indices."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.row_errors import RowProblems


def class_indices(rows: Any, column: str, names: Sequence[str], where: str, numbers: Sequence[int]) -> list[int]:
    """Look up each row's class, by name if the data has names, otherwise by number.

    Args:
        where: description of the split, for messages.
        numbers: positions of the rows in that split.
    """
    values = [[value] for value in rows[column]]
    return [index for [index] in _lookup(values, rows.features[column], names, RowProblems(where, numbers), "rows")]


def word_classes(rows: Any, column: str, names: Sequence[str], where: str, numbers: Sequence[int]) -> list[list[int]]:
    """Look up the classes of each row's words."""
    feature = rows.features[column]
    if not hasattr(feature, "feature"):
        raise PimergeError(f"the column '{column}' of {where} holds no lists", "give each row a list of labels")
    return _lookup(rows[column], feature.feature, names, RowProblems(where, numbers), "words in rows")


def _lookup(
    values: Sequence[Sequence[Any]], feature: Any, names: Sequence[str], problems: RowProblems, unit: str
) -> list[list[int]]:
    """Look up the class of each value of each row."""
    index_of = {name: index for index, name in enumerate(names)}
    classes: dict[Hashable, int | None] = {index: index for index in range(len(names))}
    own_names: list[str] = getattr(feature, "names", None) or []
    if set(own_names) & set(names):  # a ClassLabel, whose numbers refer to its own names
        classes = {index: index_of.get(name) for index, name in enumerate(own_names)}
    classes.update(index_of.items())
    unknown: dict[str, list[int]] = {}
    indices: list[list[int]] = []
    for place, row in enumerate(values):
        indices.append([])
        for value in row:
            known = classes.get(value) if isinstance(value, Hashable) else None
            if known is None:
                shown = repr(own_names[value] if own_names and value is not None and value >= 0 else value)
                unknown.setdefault(shown, []).append(place)
            else:
                indices[-1].append(known)
    if unknown:
        listed = ", ".join(
            f"{value} ({len(places)} {unit}: {problems.listed(list(dict.fromkeys(places)))}, from 0)"
            for value, places in list(unknown.items())[:5]
        )
        problems.add(
            sorted({place for places in unknown.values() for place in places}),
            f"{problems.where} has unknown labels: {listed}",
            f"task.json knows {', '.join(names)} (or 0 to {len(names) - 1})",
        )
    problems.raise_any()
    return indices
