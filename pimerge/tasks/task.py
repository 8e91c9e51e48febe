"""A task: ``task.json`` or rows in memory → labelled rows → encoded examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.core.documents import parse_document, validated
from pimerge.core.errors import PimergeError, Problem, nearest
from pimerge.core.files import sha256_bytes
from pimerge.tasks.checks import check_fields, require_type
from pimerge.tasks.data import NamedData, RowsInMemory, TaskData
from pimerge.tasks.delimited import delimiter_hint
from pimerge.tasks.examples import Examples, Rows
from pimerge.tasks.image_paths import hashes_of_named, holds_paths, with_images
from pimerge.tasks.inference import SplitRows, class_names_of, infer_columns, infer_labels, infer_type, rows_by_split
from pimerge.tasks.metric import default_metric
from pimerge.tasks.reading import SplitReader, sample_rows
from pimerge.tasks.row_errors import RowProblems, RowsError
from pimerge.tasks.schema import COMMON, LATER, UNLABELLED, TaskFile
from pimerge.tasks.task_type import TASK_TYPES, TaskType
from pimerge.tasks.text_columns import words_of

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig

TASK_FILE = "task.json"


@dataclass(frozen=True)
class Task:
    """A task whose description has been read and checked; :meth:`rows` reads its data.

    Attributes:
        path: path of ``task.json``; the task's name for rows in memory.
        file: content of ``task.json``.
        splits: split → rows, if they are in memory.
        up_to_shots: whether a class with fewer examples than ``shots`` gives all of them, instead of an error.
    """

    path: Path
    file: TaskFile
    splits: Mapping[str, datasets.Dataset] | None = None
    up_to_shots: bool = False

    @classmethod
    def from_rows(
        cls,
        rows: SplitRows | Mapping[str, SplitRows],
        *,
        type: str | None = None,
        test: SplitRows | None = None,
        labels: Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        name: str = "target",
        **fields: Any,
    ) -> Task:
        """Make a task from rows in memory.

        Args:
            rows: training rows, a ``datasets.Dataset`` or a list of dicts; or split → rows.
            type: type of task; by default inferred from the columns, such as ``text`` and ``label``.
            test: test rows.
            labels: names of the classes; by default the names of a ``ClassLabel`` column, or the distinct texts in the
                label's column, in alphabetical order.
            columns: role → column, for columns whose name differs from their role.
            name: name of the task in messages and outputs.
            **fields: other fields of ``task.json``, such as ``prompt``.

        Returns:
            a task that every stage accepts in place of a path. The ``task.json`` beside an output describes it with
            hashes in place of its rows.

        >>> rows = [{"text": "oh no", "label": "bad"}, {"text": "hooray", "label": "good"}]
        >>> task = Task.from_rows(rows, test=rows[:1])
        >>> task.file.type, task.labels, task.rows("test")[1]
        ('text-classification', ['bad', 'good'], [0])
        """
        splits = rows_by_split(rows, test)
        first = next(iter(splits.values())).column_names
        kind = infer_type(first) if type is None else type
        content = {"type": kind, "labels": labels and list(labels), **fields}
        where = f"the task '{name}'"
        if set(fields) & {"data", "subset", "revision", "rows"}:
            raise PimergeError(f"{where} has rows in memory, and data besides", "pass one of the two")
        require_type(kind, where)
        content["columns"] = infer_columns(kind, first, columns)
        task = cls(Path(name), validated(TaskFile, content, where), splits)
        check_fields(task.file, where)
        if task.type.trains_head and labels is None:
            task = task._labelled(infer_labels(splits, task.label_column))
        if column := task.columns.get("image"):
            opened = {
                split: with_images(found, column, [Path.cwd()], where) if holds_paths(found, column) else found
                for split, found in splits.items()
            }
            task = replace(task, splits=opened)
        return task

    @property
    def data(self) -> TaskData:
        """The source of the rows."""
        return NamedData(self.path, self.file) if self.splits is None else RowsInMemory(self.name, self.splits)

    @property
    def name(self) -> str:
        """The name of the folder that holds ``task.json``, or the name given to rows in memory."""
        return self.path.resolve().parent.name if self.splits is None else str(self.path)

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty if answers are free text."""
        return self.file.labels or []

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that ``eval`` shows besides the loss."""
        return self.file.metrics or [default_metric(self.type.answer_forms(self.file)[0])]

    @property
    def of_words(self) -> bool:
        """Whether each word has a class, instead of each example."""
        return "labels" in self.type.columns

    @property
    def type(self) -> TaskType:
        """The type of task."""
        return TASK_TYPES.load(self.file.type)

    @property
    def columns(self) -> dict[str, str]:
        """Role → column; by default a column has the name of its role."""
        required = self.type.columns
        labelled = {"label"} if self.labels else set()
        given = {"choices"} if self.file.choices is not None else set()  # by a template
        needed = {role: role for role in required if (required[role] or role in labelled) and role not in given}
        return needed | self.file.columns

    @property
    def label_column(self) -> str:
        """The column with the class of each row, or of its words."""
        role = "labels" if self.of_words else "label"
        return self.file.columns.get(role, role)

    def _labelled(self, labels: Sequence[str]) -> Task:
        return replace(self, file=self.file.model_copy(update={"labels": list(labels)}))

    def sha256(self) -> str:
        """SHA-256 of the settings in ``task.json`` and of the data, or its Hub id; independent of paths."""
        unset = set(TaskFile.model_fields) - (COMMON - LATER) - self.file.given()
        meaning = self.file.model_dump_json(exclude={"data", "rows", "description"} | unset)
        parts = [meaning, json.dumps(self.data.content(), sort_keys=True)]
        if "image" in self.columns:
            parts += hashes_of_named(self.data, self.columns["image"], [self._split("train"), self._split("test")])
        return sha256_bytes("\n".join(parts).encode())

    def document_for(self, folder: Path) -> dict[str, Any]:
        """The content of a ``task.json`` in another folder for the same task, with hashes for rows in memory."""
        return {**self.file.model_dump(exclude_none=True), **self.data.fields_for(folder)}

    def has_split(self, role: str) -> bool:
        """Whether the task has a split for an optional role."""
        return role in self.file.splits or self.data.has(role)

    def _split(self, role: str) -> str:
        return self.file.splits.get(role, role)

    def _where(self, role: str) -> str:
        return f"the {role} split '{self._split(role)}' of '{self.path}'"

    def rows(self, role: str) -> tuple[Any, list[int]]:
        """Read one split: its rows (a ``datasets.Dataset``) and the class index of each, 0 without classes.

        Args:
            role: ``train``, ``test`` or ``unlabelled``; the last needs no labels, and all its rows have the class 0.
        """
        found = self._rows(role)
        return found.table, list(found.labels)

    def _rows(self, role: str, left_out: Set[int] = frozenset()) -> Rows:
        """Read one split except for some rows."""
        reader = SplitReader(
            data=self.data,
            split=self._split(role),
            where=self._where(role),
            columns=self.columns,
            labels=self.labels,
            of_words=self.of_words,
            labelled=role != UNLABELLED,
            texts=self.type.texts,
            numbers=self.file.numbers or (),
            skip_unlabelled=bool(self.file.skip_unlabelled),
        )
        return reader.rows(left_out)

    def examples(
        self,
        role: str,
        processor: Any,
        config: PreTrainedConfig,
        *,
        shots: int | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> tuple[Examples, list[int]]:
        """Encode one split for a model.

        Args:
            role: as in :meth:`rows`.
            processor: the base's tokenizer or processor.
            config: the base's config.
            shots: examples to sample per class, or in total without classes; None uses all. If words have classes, at
                least this many sentences contain each class that occurs.
            seed: seed of the sampling.
            limit: maximum number of examples in total, sampled.

        Returns:
            the examples in the order of the data, and the class index of each. If rows cannot be encoded, one error
            lists the problems of all rows of the split.
        """
        try:
            rows = self._rows(role)
            places = sample_rows(rows, self.labels, self.of_words, shots, limit, seed, self.up_to_shots)
            sampled = rows.select(places)
            examples = self.type.encode(sampled, self.file, processor, config)
            return replace(examples, skipped=sampled.skipped), list(sampled.labels)
        except RowsError as error:
            self._raise_all(error, role, processor, config)
            raise

    def _raise_all(self, error: RowsError, role: str, processor: Any, config: PreTrainedConfig) -> None:
        """Raise the problems of some rows together with problems of other rows that a later stage finds."""
        broken = RowProblems(self._where(role), ())
        broken.extend(error)
        while True:
            others: Sequence[Problem] = ()
            try:
                rows = self._rows(role, broken.rows)
                if rows.labels:
                    self.type.encode(rows, self.file, processor, config)
            except RowsError as more:
                broken.extend(more)
                continue
            except PimergeError as of_no_row:
                others = of_no_row.problems
            broken.raise_any(others)


TaskSource: TypeAlias = "str | Path | Task | SplitRows | Mapping[str, SplitRows]"
"""A task as stages accept it: a path, an open task, or rows in memory."""


def open_task(source: TaskSource) -> Task:
    """Open a task.

    Args:
        source: a ``task.json`` or its folder, or rows in memory as in :meth:`Task.from_rows`; a task is returned
            unchanged.

    Returns:
        the task. Without ``labels``, a classification reads them from the data.
    """
    if isinstance(source, Task):
        return source
    if not isinstance(source, str | Path):
        return Task.from_rows(source)
    path = Path(source)
    path = path / TASK_FILE if path.is_dir() else path
    if not path.is_file():
        raise PimergeError(
            f"there is no '{path}'",
            "write one beside the expert: type, data, splits, columns, labels (see docs/tasks.md)",
        )
    task, where = Task(path, parse_document(TaskFile, path)), f"'{path}'"
    require_type(task.file.type, where)
    check_fields(task.file, where)
    return task._labelled(_class_names(task)) if task.type.trains_head and task.file.labels is None else task


def _class_names(task: Task) -> list[str]:
    """Read the class names of the label's column."""
    column, where = task.label_column, task._where("train")
    rows = task.data.load(task._split("train"))
    if column not in rows.column_names:
        hint = delimiter_hint(rows.column_names) or nearest(column, rows.column_names)
        raise PimergeError(f"{where} has no column '{column}' for the label", hint)
    if not (names := class_names_of(rows.features[column])):
        raise PimergeError(
            f"'{task.path}' has no labels, and the column '{column}' of its train split names no classes: it holds "
            f"{words_of(rows.data.schema.field(column).type)}",
            "list the names of the classes as labels",
        )
    return names
