"""Read one split: check its columns and find the class of each row."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.data import NOT_EMPTY, TaskData
from pimerge.tasks.examples import Rows
from pimerge.tasks.image_paths import holds_paths, with_images
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.sampling import permutation, sample_sentences, sample_shots


@dataclass(frozen=True, kw_only=True)
class SplitReader:
    """Reader of one split of a task.

    Attributes:
        data: data of the task.
        split: name of the split in the data.
        where: description of the split, for messages.
        columns: role → column.
        labels: names of the classes.
        of_words: whether each word has a class, instead of each example.
        labelled: whether the split has labels; otherwise every row or word has the class 0.
    """

    data: TaskData
    split: str
    where: str
    columns: Mapping[str, str]
    labels: Sequence[str]
    of_words: bool
    labelled: bool

    def rows(self, left_out: Set[int] = frozenset()) -> Rows:
        """Read the split except for some rows; all problems of its rows are raised at once."""
        whole = self.data.load(self.split)
        problems = Problems()
        if len(whole) == 0:
            problems.add(f"{self.where} is empty", NOT_EMPTY)
        numbers = [number for number in range(len(whole)) if number not in left_out]
        table = whole.select(numbers) if left_out else whole
        broken = RowProblems(self.where, numbers)
        for role, column in self._needed().items():
            if column not in table.column_names:
                hint = nearest(column, table.column_names)
                problems.add(f"{self.where} has no column '{column}' for the {role}", hint)
            elif role != "label":
                _note_empty(table, role, column, broken)
        classes, words = [0] * len(table), self._words_without_classes(table)
        with problems.collected(), broken.collected():
            if self._has(table, "label") and self.labels and not self.of_words:
                classes = class_indices(table, self.columns["label"], self.labels, self.where, numbers)
            if self._has(table, "labels") and self.of_words:
                words = word_classes(table, self.columns["labels"], self.labels, self.where, numbers)
        column, folders = self.columns.get("image", ""), self.data.folders(self.split)
        if folders and holds_paths(table, column):
            with problems.collected():
                table = with_images(table, column, folders, self.where)
        broken.raise_any(problems.found)
        return Rows(table, self.columns, classes, numbers, self.where, words)

    def _needed(self) -> dict[str, str]:
        return {role: column for role, column in self.columns.items() if self.labelled or not role.startswith("label")}

    def _has(self, table: Any, role: str) -> bool:
        return self._needed().get(role) in table.column_names

    def _words_without_classes(self, table: Any) -> list[list[int]]:
        """The class 0 for each word of a split without labels."""
        if self.labelled or not self.of_words or not self._has(table, "tokens"):
            return []
        return [[0] * len(sentence or ()) for sentence in table[self.columns["tokens"]]]


def _note_empty(table: Any, use: str, column: str, broken: RowProblems) -> None:
    """Record the rows with an empty cell in a column."""
    if not table.data.column(column).null_count:
        return
    values = table.select_columns([column]).with_format("arrow")[:][column]
    if empty := [place for place, null in enumerate(values.is_null().to_pylist()) if null]:
        rows = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
        message = f"{broken.where} has no {use} in {rows}: {broken.listed(empty)} (from 0)"
        broken.add(empty, message, "fill them or leave them out")


def sample_rows(
    rows: Rows, names: Sequence[str], of_words: bool, shots: int | None, limit: int | None, seed: int
) -> list[int]:
    """Sample positions of ``shots`` rows per class, at most ``limit`` in total; None means no limit."""
    chosen = list(range(len(rows.labels)))
    if shots is not None and of_words:
        chosen = sample_sentences([set(classes) for classes in rows.words], shots, seed, names)
    elif shots is not None:
        chosen = sample_shots(rows.labels, shots, seed, names)
    if limit is not None and limit < len(chosen):
        chosen = sorted(chosen[place] for place in permutation(len(chosen), seed)[:limit])
    return chosen


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
