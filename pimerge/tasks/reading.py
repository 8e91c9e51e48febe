"""Read one split: check its columns and find the class of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.class_lookup import cell_texts, find_classes
from pimerge.tasks.data import NOT_EMPTY, TaskData
from pimerge.tasks.delimited import delimiter_hint
from pimerge.tasks.examples import Rows
from pimerge.tasks.image_paths import holds_paths, with_encoded_images, with_images
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.sampling import permutation, sample_sentences, sample_shots
from pimerge.tasks.text_columns import shown_as_json, with_numbers, with_texts, words_of


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
        texts: roles whose columns are texts.
        numbers: columns whose texts are numbers.
        skip_unlabelled: whether to leave out rows without a label, instead of refusing them.
    """

    data: TaskData
    split: str
    where: str
    columns: Mapping[str, str]
    labels: Sequence[str]
    of_words: bool
    labelled: bool
    texts: Sequence[str] = ()
    numbers: Sequence[str] = ()
    skip_unlabelled: bool = False

    def rows(self, left_out: Set[int] = frozenset()) -> Rows:
        """Read the split except for some rows; all problems of its rows are raised at once."""
        whole, problems = self.data.load(self.split), Problems()
        if len(whole) == 0:
            raise PimergeError(f"{self.where} is empty", NOT_EMPTY)
        with problems.collected():
            whole = with_numbers(whole, self.numbers, self.where)
        numbers = [number for number in range(len(whole)) if number not in left_out]
        unlabelled = self._unlabelled(whole, numbers) if self.skip_unlabelled else set()
        numbers = [number for number in numbers if number not in unlabelled]
        if unlabelled and not numbers:
            problems.add(f"no row of {self.where} has a label", "'skip_unlabelled' leaves out all of them")
        self._note_missing(whole.column_names, problems)
        table = whole.select(numbers) if len(numbers) < len(whole) else whole
        broken = RowProblems(self.where, numbers)
        for role, column in self._needed().items():
            if column in table.column_names and role != "label":
                _note_empty(table, role, column, broken)
                if role in self.texts:
                    with problems.collected():
                        table = with_texts(table, role, column, broken)
        classes, words = [0] * len(table), self._words_without_classes(table)
        with problems.collected():
            if self._has(table, "label") and self.labels and not self.of_words:
                classes = class_indices(table, self.columns["label"], self.labels, broken)
            if self._has(table, "labels") and self.of_words:
                words = word_classes(table, self.columns["labels"], self.labels, broken)
        column, folders = self.columns.get("image", ""), self.data.folders(self.split)
        if folders and holds_paths(table, column):
            with problems.collected():
                table = with_images(table, column, folders, self.where)
        elif column in table.column_names:
            table = with_encoded_images(table, column)
        broken.raise_any(problems.found)
        return Rows(table, self.columns, classes, numbers, self.where, words, len(unlabelled))

    def _note_missing(self, columns: Sequence[str], problems: Problems) -> None:
        """Record columns that are not there; a file with another delimiter is one problem."""
        missing = {role: column for role, column in self._needed().items() if column not in columns}
        if missing and (hint := delimiter_hint(columns)):
            problems.add(f"{self.where} has only one column, '{columns[0]}'", hint)
            return
        if missing.keys() == self._needed().keys() and set(columns) & set(self.labels):
            problems.add(
                f"{self.where} has no columns {', '.join(missing.values())}, but {', '.join(columns)}",
                "its first line seems to be a row: add a line that names the columns, or name them in columns",
            )
            return
        for role, column in missing.items():
            problems.add(f"{self.where} has no column '{column}' for the {role}", nearest(column, columns))

    def _unlabelled(self, table: Any, numbers: Sequence[int]) -> set[int]:
        """The numbers of the rows in which a label is missing."""
        role = "labels" if self.of_words else "label"
        if not self.labels or not self._has(table, role):
            return set()
        column = self.columns[role]
        feature, rows = table.features[column], table[column][:]
        if self.of_words and not hasattr(feature, "feature"):
            return set()
        values = [rows[number] if self.of_words else [rows[number]] for number in numbers]
        texts = cell_texts(
            [[None] if row is None else row for row in values], getattr(feature, "feature", feature), self.labels
        )
        return {number for number, row in zip(numbers, texts, strict=True) if None in row}

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
    rows: Rows, names: Sequence[str], of_words: bool, shots: int | None, limit: int | None, seed: int, up_to: bool
) -> list[int]:
    """Sample positions of ``shots`` rows per class, at most ``limit`` in total; None means no limit.

    Args:
        up_to: take all rows of a class with fewer than ``shots``, instead of refusing.
    """
    chosen = list(range(len(rows.labels)))
    if shots is not None and of_words:
        chosen = sample_sentences([set(classes) for classes in rows.words], shots, seed, names, up_to=up_to)
    elif shots is not None:
        chosen = sample_shots(rows.labels, shots, seed, names, up_to=up_to)
    if limit is not None and limit < len(chosen):
        chosen = sorted(chosen[place] for place in permutation(len(chosen), seed)[:limit])
    return chosen


def class_indices(rows: Any, column: str, names: Sequence[str], broken: RowProblems) -> list[int]:
    """Look up each row's class; what is not a class is recorded in ``broken``, as the class 0."""
    _require_one_class(rows, column, broken.where)
    texts = cell_texts([[value] for value in rows[column][:]], rows.features[column], names)
    found = find_classes(texts, names, broken, "rows", _swapped(rows, column, names))
    return [classes[0] if classes else 0 for classes in found]


def word_classes(rows: Any, column: str, names: Sequence[str], broken: RowProblems) -> list[list[int]]:
    """Look up the classes of each row's words; what is not a class is recorded in ``broken``."""
    feature = rows.features[column]
    if not hasattr(feature, "feature"):
        raise PimergeError(f"the column '{column}' of {broken.where} holds no lists", "give each row a list of labels")
    texts = cell_texts([row or [] for row in rows[column][:]], feature.feature, names)
    return find_classes(texts, names, broken, "words in rows")


def _require_one_class(rows: Any, column: str, where: str) -> None:
    """Refuse a column whose cells cannot be single classes."""
    words = words_of(rows.data.schema.field(column).type)
    hints = {
        "lists": "give each row one class: several labels per row are not supported",
        "objects": "give each row the name of its class",
    }
    if words in hints:
        shown = shown_as_json(next((value for value in rows[column] if value is not None), None))
        raise PimergeError(f"the column '{column}' of {where} holds {words}, such as {shown}", hints[words])


def _swapped(rows: Any, column: str, names: Sequence[str]) -> str:
    """What to do if another column holds the classes; empty if none does."""
    for other in rows.column_names:
        if other != column and getattr(rows.features[other], "dtype", "") in ("string", "large_string"):
            values = set(rows[other])
            if values and values <= set(names):
                return f"the column '{other}' holds names of classes: name it as the label in columns"
    return ""
