"""Prompts and answers from Jinja2 templates over a row's columns, in bounded time and memory.

A template can use every column by its name (an image as its width and height), and the name of the row's class as
``label``. A missing column and a null value are errors, and there are no random filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.core.confined import confined
from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.row_errors import RowProblems

if TYPE_CHECKING:
    from pimerge.tasks.examples import Rows
    from pimerge.tasks.schema import TaskFile

LABEL = "label"
_RENDERING = "pimerge.tasks.rendering"


@dataclass(frozen=True)
class Text:
    """A row as texts.

    Attributes:
        prompt: text of the prompt.
        answers: candidate answers: the text of each class, or a single answer without classes.
        right: index of the right answer.
        references: all answers that count as right.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int
    references: tuple[str, ...]


class Template:
    """One template of ``task.json``.

    Args:
        field: name of the field.
        source: text of the template.

    >>> Template("prompt", "Is it a {{ animal }}?").text({"animal": "cat"})
    'Is it a cat?'
    >>> Template("answer", "{{ answers }}").values({"answers": ["yes", "of course"]})
    ['yes', 'of course']
    """

    def __init__(self, field: str, source: str) -> None:
        self.field, self.source = field, source
        try:
            self.names: set[str] = set(confined(f"{_RENDERING}:names_in", source))
        except PimergeError as error:
            raise PimergeError(
                f"{field}: {error.problems[0].message}", "it is a Jinja2 template, such as 'Review: {{ text }}'"
            ) from error

    def text(self, values: Mapping[str, Any]) -> str:
        """Fill in the template."""
        return str(self._filled("text", values))

    def values(self, values: Mapping[str, Any]) -> list[str]:
        """Like :meth:`text`, but one text per item if the template is a single expression that gives a list."""
        return list(self._filled("texts", values))

    def _filled(self, how: str, values: Mapping[str, Any]) -> Any:
        try:
            return confined(f"{_RENDERING}:{how}", self.source, dict(values))
        except PimergeError as error:
            raise PimergeError(
                f"the {self.field} cannot be filled in: {error.problems[0].message}", "fix the template or the row"
            ) from error


def check_texts(file: TaskFile) -> None:
    """Check the prompt and answers of a ``task.json``; all problems are raised at once."""
    problems = Problems()
    if file.prompt is None:
        problems.add("there is no prompt", "write a prompt, such as 'Review: {{ text }}'")
    templates = {}
    for field in ("prompt", "answer"):
        with problems.collected():
            if (source := getattr(file, field)) is not None:
                templates[field] = Template(field, source)
    if file.labels is None:
        _check_free(file, problems)
    else:
        _check_labelled(file, file.labels, templates, problems)
    problems.raise_any("it does not fit")


def _check_free(file: TaskFile, problems: Problems) -> None:
    if file.answer is None:
        problems.add("there are neither labels nor an answer", "write an answer, such as '{{ summary }}'")
    for field, needed in (("verbalizer", file.verbalizer is not None), ("scoring", file.scoring == "likelihood")):
        if needed:
            problems.add(f"{field} chooses between classes, and there are no labels", "list the labels")


def _check_labelled(
    file: TaskFile, labels: Sequence[str], templates: Mapping[str, Template], problems: Problems
) -> None:
    if "prompt" in templates and LABEL in templates["prompt"].names:
        problems.add("the prompt shows the label, which is to be answered", "leave '{{ label }}' to the answer")
    if file.answer is not None and file.verbalizer is not None:
        problems.add("there are both an answer and a verbalizer", "with labels, write one of the two")
    if "answer" in templates and LABEL not in templates["answer"].names:
        problems.add("the answer is the same for all labels", "let it say '{{ label }}', or leave it out")
    words = file.verbalizer or {}
    for name in sorted(words.keys() - set(labels)):
        problems.add(f"the verbalizer names the label '{name}'", nearest(name, labels))
    if missing := [name for name in labels if words and name not in words]:
        problems.add(f"the verbalizer has no text for {', '.join(missing)}", "give each label one")
    texts = [words.get(name, name).strip() for name in labels]
    if "" in texts:
        problems.add(f"the text of the label '{labels[texts.index('')]}' is empty", "give it one that can be answered")
    elif file.answer is None and len(set(texts)) < len(texts):
        problems.add("two labels have the same text", "give each label one of its own")


def fill_in(rows: Rows, file: TaskFile) -> list[Text]:
    """Fill in the templates for every row."""
    assert file.prompt is not None
    prompt = Template("prompt", file.prompt)
    answer = None if file.answer is None else Template("answer", file.answer)
    used = prompt.names | (answer.names if answer else set())
    own = {LABEL} if file.labels else set()
    require_columns(rows, used - own)
    names = file.labels or []
    words = [(file.verbalizer or {}).get(name, name).strip() for name in names]
    problems = RowProblems(rows.where, rows.numbers)
    found = []
    read = reader(rows, used - own)
    for position, label in enumerate(rows.labels):
        row, asked = None, ""
        with problems.row(position):
            row = read(position)
            asked = _required("prompt", prompt.text(row))
        if row is None:
            continue
        with problems.row(position):
            if answer is None:
                candidates = [[word] for word in words]
            else:
                choices = [{LABEL: name} for name in names] or [{}]
                candidates = [[text.strip() for text in answer.values({**row, **choice})] for choice in choices]
            for accepted in candidates:
                for text in accepted or [""]:
                    _required("answer", text)
            texts = tuple(accepted[0] for accepted in candidates)
            if len(set(texts)) < len(texts):
                raise PimergeError("two labels have the same answer", "make the answer depend on the label")
            found.append(Text(asked, texts, label, tuple(candidates[label])))
    problems.raise_any()
    return found


def _required(field: str, text: str) -> str:
    if not text.strip():
        raise PimergeError(f"the {field} is empty", "fill the row or leave it out")
    return text


def require_columns(rows: Rows, names: Iterable[str]) -> None:
    """Check that the columns named in templates exist."""
    problems = Problems()
    columns = list(rows.table.column_names)
    for name in sorted(set(names) - set(columns)):
        problems.add(f"{rows.where} has no column '{name}', which a template names", nearest(name, columns))
    problems.raise_any("the templates name columns that are not there")


def reader(rows: Rows, columns: Iterable[str]) -> Callable[[int], Mapping[str, Any]]:
    """Make a function that reads some columns of a row by its position; an image becomes its width and height.

    The function raises a PimergeError if the row cannot be read.
    """
    names = sorted(set(columns))
    table = rows.table.select_columns(names) if names else [{}] * len(rows.labels)

    def read(place: int) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = _plain(table[place])
        except Exception as error:  # decoding a broken image can raise any error
            raise PimergeError(f"it cannot be read: {error}", "fix the file or leave the row out") from error
        return found

    return read


def _plain(value: Any) -> Any:
    """Decode bytes, and strip images of their methods, which could write files from inside the sandbox."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    if hasattr(value, "width") and hasattr(value, "height"):
        return {"width": value.width, "height": value.height}
    return value
