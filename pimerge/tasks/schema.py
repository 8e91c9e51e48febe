"""The content of ``task.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

COMMON = frozenset({"type", "data", "subset", "revision", "rows", "splits", "columns", "labels", "description"})
"""The fields of every type; each type says which of the others it uses (``FIELDS``)."""

UNLABELLED = "unlabelled"
ROLES = ("train", "test", UNLABELLED)
"""What splits are for."""


class TaskFile(BaseModel):
    """The content of ``task.json``.

    Attributes:
        type: a type of task, one of ``pimerge/tasks/types``.
        data: a file or folder (relative to ``task.json``), split → file(s), or the Hub id of a data set; None where the
            rows were in memory.
        subset: of a data set on the Hub, or in a folder of that form. revision: on the Hub.
        rows: split → SHA-256 of its rows, for rows that were in memory; written by pimerge.
        splits: role (``train``, ``test``) → split of the data set, in its slicing syntax (``train[:80%]``).
        columns: role (``text``, ``image``, ``label``) → column.
        labels: the names of the classes; label i in the data is the i-th of them. None where answers are free, or where
            the data names the classes.
        description: for people.
        prompt: Jinja2 template of what the model is asked, over the row's columns.
        answer: Jinja2 template of what it should answer; by default the text of the row's class.
        verbalizer: class → its text; by default its name.
        scoring: ``likelihood`` (the likeliest answer of all classes counts) or ``generation`` (what it writes).
        chat: whether prompts go through the tokenizer's chat template.
        metrics: what ``eval`` shows besides the loss; accuracy, or exact-match without labels, if it is not given.
        choices: Jinja2 template of a list, the row's choices, where no column holds them as one.
        normalise: the likeliest choice is so by the ``sum`` of log p over its tokens, or by their mean (``tokens``).
        max_new_tokens: most tokens that are generated for an answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    data: str | dict[str, str | list[str]] | None = None
    subset: str | None = None
    revision: str | None = None
    rows: dict[str, str] | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    description: str | None = None
    prompt: str | None = None
    answer: str | None = None
    verbalizer: dict[str, str] | None = None
    scoring: Literal["likelihood", "generation"] | None = None
    chat: bool | None = None
    metrics: Annotated[list[str], Field(min_length=1)] | None = None
    choices: str | None = None
    normalise: Literal["sum", "tokens"] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None

    def given(self) -> set[str]:
        """The fields that are there."""
        return {name for name, value in self if value is not None}
