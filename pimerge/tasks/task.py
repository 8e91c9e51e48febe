"""A task: ``task.json`` → labelled rows → examples of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from pimerge.core import plugins
from pimerge.core.errors import PimergeError, Problem, Problems, nearest
from pimerge.core.files import read_json, relative_to, sha256_bytes, sha256_file
from pimerge.tasks.image_paths import content_hash, holds_paths, resolved, with_images
from pimerge.tasks.labels import class_indices, word_classes
from pimerge.tasks.row_errors import RowProblems, RowsError
from pimerge.tasks.sampling import draw_holding, draw_shots, permutation
from pimerge.tasks.schema import COMMON, TaskFile
from pimerge.tasks.types import Examples, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TASK_FILE = "task.json"
UNLABELLED = "unlabelled"
ROLES = ("train", "test", UNLABELLED)
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_NOT_EMPTY = "give it at least one example"
Document = TypeVar("Document", bound=BaseModel)


def parse_document(model: type[Document], path: Path, hint: str = "") -> Document:
    """Read a JSON file that has to fit a pydantic model.

    Raises:
        PimergeError: with each field that does not fit.
    """
    content = read_json(path, hint)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = Problems()
        for fault in error.errors():
            where = ".".join(str(part) for part in fault["loc"]) or "the document"
            fix = hint
            if fault["type"] == "extra_forbidden":
                fix = nearest(str(fault["loc"][-1]), list(model.model_fields))
            problems.add(f"'{path}': {where}: {fault['msg']}", fix)
        problems.raise_any(f"'{path}' does not fit")
        raise AssertionError("unreachable: a problem was raised") from error


@dataclass(frozen=True)
class Task:
    """A task whose file has been read and checked; the data is read by :meth:`rows`.

    Attributes:
        path: its ``task.json``.
        file: the content.
    """

    path: Path
    file: TaskFile

    @property
    def name(self) -> str:
        """The name of the folder that holds ``task.json``."""
        return self.path.resolve().parent.name

    @property
    def labels(self) -> list[str]:
        """The names of the classes; none where the answers are free."""
        return self.file.labels or []

    @property
    def metrics(self) -> list[str]:
        """What ``eval`` shows besides the loss."""
        chosen = self.labels or "choices" in self.type.COLUMNS
        return self.file.metrics or ["accuracy" if chosen else "exact-match"]

    @property
    def of_words(self) -> bool:
        """Whether the classes are those of words, not of examples."""
        return "labels" in self.type.COLUMNS

    @property
    def type(self) -> ModuleType:
        """The strategy for this type of task."""
        return plugins.load("pimerge.tasks.types", self.file.type)

    @property
    def columns(self) -> dict[str, str]:
        """Role → column: as the file says, else the column has the role's name."""
        required: Mapping[str, bool] = self.type.COLUMNS
        labelled = {"label"} if self.labels else set()
        given = {"choices"} if self.file.choices is not None else set()  # by a template
        needed = {role: role for role in required if (required[role] or role in labelled) and role not in given}
        return needed | self.file.columns

    def sha256(self) -> str:
        """SHA-256 of the file's meaning and of its local data: the same wherever both lie."""
        unset = set(TaskFile.model_fields) - COMMON - self.file.given()
        meaning = self.file.model_dump_json(exclude={"data", "description"} | unset)
        parts = [meaning, json.dumps(self._content(), sort_keys=True), *self._named_images()]
        return sha256_bytes("\n".join(parts).encode())

    def _named_images(self) -> list[str]:
        """What the images hold that the task's own splits name by paths, a hash for each such split."""
        if "image" not in self.columns:
            return []
        column, found = self.columns["image"], []
        for split in sorted({self.file.splits.get(role, role) for role in ("train", "test")}):
            with suppress(PimergeError):  # a task may lack one of them
                rows, folders = _load_split(self, split), self._folders(split)
                if folders and holds_paths(rows, column):
                    found.append(content_hash(resolved(rows[column], folders, split)))
        return found

    def _folders(self, split: str) -> list[Path]:
        """Where the data files of a split lie; nowhere here if they are the Hub's."""
        data, here = self.file.data, self.path.parent
        if isinstance(data, str):
            path = here / data
            return [path] if path.is_dir() else [path.parent] if path.is_file() else []
        names = data.get(split.partition("[")[0]) or [name for group in data.values() for name in _listed(group)]
        return sorted({(here / name).parent for name in _listed(names)})

    def _content(self) -> Any:
        """What the data is: file hashes by split, or by place in the data's folder; of Hub data its id."""
        data, folder = self.file.data, self.path.parent
        if isinstance(data, str):
            path = folder / data
            if path.is_dir():
                files = (file for file in path.rglob("*") if file.is_file())
                return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
            return sha256_file(path) if path.is_file() else data
        named = {split: _listed(value) for split, value in data.items()}
        return {
            split: [sha256_file(folder / name) if (folder / name).is_file() else name for name in names]
            for split, names in named.items()
        }

    def document_for(self, folder: Path) -> dict[str, Any]:
        """The content of a ``task.json`` in another folder that means the same task."""
        data = self.file.data

        def moved(name: str) -> str:
            path = self.path.parent / name
            return relative_to(path, folder) if path.exists() else name

        if isinstance(data, str):
            rebased: Any = moved(data)
        else:
            rebased = {
                split: moved(value) if isinstance(value, str) else [moved(name) for name in value]
                for split, value in data.items()
            }
        return {**self.file.model_dump(exclude_none=True), "data": rebased}

    def has_split(self, role: str) -> bool:
        """Whether ``task.json`` names a split for a role that need not be there."""
        return role in self.file.splits or (isinstance(self.file.data, dict) and role in self.file.data)

    def rows(self, role: str) -> tuple[Any, list[int]]:
        """Read one split: its rows (a ``datasets.Dataset``) and the class index of each, 0 where there are no classes.

        Args:
            role: ``train``, ``test`` or ``unlabelled``; the last needs no labels, and has the class 0 throughout.

        Raises:
            PimergeError: if data, split or column is not there, the split is empty, or a label is unknown.
        """
        found = self._rows(role)
        return found.table, list(found.labels)

    def _rows(self, role: str, left_out: Set[int] = frozenset()) -> Rows:
        """One split without some rows, by their numbers."""
        where, split = self._where(role), self.file.splits.get(role, role)
        whole = _load_split(self, split)
        problems = Problems()
        if len(whole) == 0:
            problems.add(f"{where} is empty", _NOT_EMPTY)
        numbers = [number for number in range(len(whole)) if number not in left_out]
        table = whole.select(numbers) if left_out else whole
        broken = RowProblems(where, numbers)
        needed = self.columns.items()
        columns = {use: column for use, column in needed if role != UNLABELLED or not use.startswith("label")}
        for use, column in columns.items():
            if column not in table.column_names:
                problems.add(f"{where} has no column '{column}' for the {use}", nearest(column, table.column_names))
            elif use != "label" and whole.data.column(column).null_count:
                nulls = whole.data.column(column).is_null().to_pylist()
                if empty := [place for place, number in enumerate(numbers) if nulls[number]]:
                    rows = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
                    broken.add(
                        empty,
                        f"{where} has no {use} in {rows}: {broken.listed(empty)} (from 0)",
                        "fill them or leave them out",
                    )
        classes = [0] * len(table)
        if self.labels and not self.of_words and columns.get("label") in table.column_names:
            with broken.collected():
                classes = class_indices(table, columns["label"], self.labels, where, numbers)
        words: Sequence[Sequence[int]] = ()
        if self.of_words and columns.get("labels") in table.column_names:
            with problems.collected(), broken.collected():
                words = word_classes(table, columns["labels"], self.labels, where, numbers)
        elif self.of_words and role == UNLABELLED and columns["tokens"] in table.column_names:
            words = [[0] * len(sentence or ()) for sentence in table[columns["tokens"]]]
        column, folders = self.columns.get("image", ""), self._folders(split)
        if folders and holds_paths(table, column):
            with problems.collected():
                table = with_images(table, column, folders, where)
        broken.raise_any(problems.found)
        return Rows(table, self.columns, classes, numbers, where, words)

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
            shots: draw so many examples of each class, or in all where there are no classes; None for all. Where words
                have classes, so many sentences at least that hold each class that there is.
            limit: draw at most so many examples in all.
            seed: of both draws.

        Returns:
            the examples, in the order of the data, and the class index of each.

        Raises:
            PimergeError: as :meth:`rows`, if a class has fewer examples than ``shots``, or rows cannot be encoded; all
                that is wrong with any row of the split is told at once.
        """
        try:
            drawn = self._drawn(role, shots, limit, seed)
            return self.type.encode(drawn, self.file, processor, config), list(drawn.labels)
        except RowsError as error:
            self._raise_all(error, role, processor, config)
            raise

    def _drawn(self, role: str, shots: int | None, limit: int | None, seed: int) -> Rows:
        rows = self._rows(role)
        chosen = list(range(len(rows.labels)))
        if shots is not None and self.of_words:
            chosen = draw_holding([set(classes) for classes in rows.words], shots, seed, self.labels)
        elif shots is not None:
            chosen = draw_shots(rows.labels, shots, seed, self.labels)
        if limit is not None and limit < len(chosen):
            chosen = sorted(chosen[i] for i in permutation(len(chosen), seed)[:limit])
        return rows if len(chosen) == len(rows.labels) else rows.select(chosen)

    def _raise_all(self, error: RowsError, role: str, processor: Any, config: PreTrainedConfig) -> None:
        """Raise the problems of some rows with those of all others, which a later stage finds."""
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

    def _where(self, role: str) -> str:
        return f"the {role} split '{self.file.splits.get(role, role)}' of '{self.path}'"


def open_task(path: str | Path) -> Task:
    """Open a task by its ``task.json`` or the folder that holds it.

    A classification without labels takes their names from the data, which is read for that.

    Raises:
        PimergeError: with every problem of the file.
    """
    file = Path(path)
    file = file / TASK_FILE if file.is_dir() else file
    if not file.is_file():
        raise PimergeError(
            f"there is no '{file}'",
            "write one beside the expert: type, data, splits, columns, labels (see docs/tasks.md)",
        )
    task = Task(file, parse_document(TaskFile, file))
    problems = Problems()
    known = list(plugins.summaries("pimerge.tasks.types"))
    if task.file.type not in known:
        problems.add(f"'{file}': type is '{task.file.type}'", nearest(task.file.type, known))
        problems.raise_any(f"'{file}' does not fit")
    for field in sorted(task.file.given() - COMMON - task.type.FIELDS):
        problems.add(
            f"'{file}': {field} means nothing to the type '{task.file.type}'",
            f"it knows {', '.join(sorted(task.type.FIELDS))}" if task.type.FIELDS else "leave it out",
        )
    for role in sorted(set(task.file.columns) - set(task.type.COLUMNS)):
        problems.add(f"'{file}': columns names the role '{role}'", nearest(role, list(task.type.COLUMNS)))
    for role in sorted(set(task.file.splits) - set(ROLES)):
        problems.add(f"'{file}': splits names the role '{role}'", nearest(role, ROLES))
    if len(set(task.labels)) < len(task.labels):
        problems.add(f"'{file}': labels has a name twice", "give each class a name of its own")
    with problems.collected(f"'{file}': "):
        task.type.check(task.file)
    problems.raise_any(f"'{file}' does not fit")
    if task.type.TRAINS_HEAD and task.file.labels is None:
        task = replace(task, file=task.file.model_copy(update={"labels": _class_names(task)}))
    return task


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _load_split(task: Task, split: str) -> Any:
    """One split of the task's data as a ``datasets.Dataset``."""
    import datasets

    source, options = _source(task)
    files = options.get("data_files", {})
    named = {name: paths for name, paths in files.items() if name in re.findall(r"\w+", split)}
    if named:  # the others need not have the same columns
        options["data_files"] = named
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, split=split, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        if "corresponds to no data" in reason:  # how datasets says that a split has no rows
            raise PimergeError(f"the split '{split}' of '{task.path}' is empty", _NOT_EMPTY) from error
        splits = [str(name) for name in files] or ["train", "test"]
        hint = nearest(split, splits) if "split" in reason.lower() else "check 'data' and 'splits' in task.json"
        raise PimergeError(f"the split '{split}' of '{task.path}' cannot be read: {reason}", hint) from error


def _source(task: Task) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` has to load."""
    data, folder = task.file.data, task.path.parent
    if isinstance(data, str) and not (folder / data).is_file():
        if (folder / data).is_dir():
            return str(folder / data), {"name": task.file.subset}
        return data, {"name": task.file.subset, "revision": task.file.revision}
    given = {"train": data} if isinstance(data, str) else data
    names = {split: _listed(value) for split, value in given.items()}
    problems = Problems()
    endings = set()
    for name in (name for group in names.values() for name in group):
        ending = Path(name).suffix.lower()
        endings.add(ending)
        if not (folder / name).is_file():
            problems.add(f"'{task.path}': there is no data file '{folder / name}'")
        elif ending not in _BUILDERS:
            problems.add(f"'{task.path}': '{name}' ends in '{ending}'", "expected " + ", ".join(_BUILDERS))
    problems.raise_any(f"the data of '{task.path}' does not fit")
    formats = {(_BUILDERS[ending], ending == ".tsv") for ending in endings}
    if len(formats) != 1:
        raise PimergeError(f"'{task.path}': data mixes {', '.join(sorted(endings))}", "use one format for all splits")
    files = {split: [str((folder / name).resolve()) for name in group] for split, group in names.items()}
    builder, by_tabs = formats.pop()
    return builder, {"data_files": files, **({"sep": "\t"} if by_tabs else {})}


def _class_names(task: Task) -> list[str]:
    """The names that the label's column has for its classes.

    Raises:
        PimergeError: if the data cannot be read or has no names.
    """
    column, where = task.columns["labels" if task.of_words else "label"], task._where("train")
    features = _load_split(task, task.file.splits.get("train", "train")).features
    if column not in features:
        raise PimergeError(f"{where} has no column '{column}' for the label", nearest(column, list(features)))
    feature = features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None) or []  # a word's, of a list of labels
    if len(names) < 2:
        raise PimergeError(
            f"'{task.path}' has no labels, and the column '{column}' of its train split names no classes",
            "list the names of the classes as labels",
        )
    return list(names)
