"""The content of ``task.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LATER = frozenset({"skip_unlabelled", "numbers"})
"""Fields of every type that count for a task's hash only where they are given, so that older hashes stay."""
COMMON = LATER | {"type", "data", "subset", "revision", "rows", "splits", "columns", "labels", "description"}
"""The fields of every type; a type names its further fields in ``TaskType.fields``."""

UNLABELLED = "unlabelled"
ROLES = ("train", "test", UNLABELLED)
"""Roles of splits."""


class TaskFile(BaseModel):
    """The content of ``task.json``.

    Attributes:
        type: type of task, one of ``pimerge/tasks/types``.
        data: a file or folder (relative to ``task.json``), split → file(s), or the Hub id of a data set; None if the
            rows were in memory. Beside the splits, ``delimiter``, ``encoding`` and ``quoting`` say how text files are
            written.
        subset: configuration of a data set on the Hub, or in a folder of that form.
        revision: revision of a data set on the Hub.
        rows: split → SHA-256 of its rows, for rows that were in memory; written by pimerge.
        splits: role (``train``, ``test``) → split of the data set, in its slicing syntax (``train[:80%]``).
        columns: role (``text``, ``image``, ``label``) → column.
        numbers: columns whose cells are numbers although the file holds texts, as every CSV does.
        labels: names of the classes. A cell means the class whose name its text is; whole numbers that are no names
            are indices. None if answers are free text, or the data names the classes.
        skip_unlabelled: whether rows without a label (null, empty or −1) are left out, instead of refused.
        description: free text for readers.
        prompt: Jinja2 template of the prompt, over the row's columns.
        answer: Jinja2 template of the expected answer; by default the text of the row's class.
        verbalizer: class → its text; by default its name.
        scoring: ``likelihood`` chooses the likeliest class; ``generation`` takes the text that the model generates.
        chat: whether prompts go through the tokenizer's chat template.
        metrics: metrics that ``eval`` shows besides the loss; by default accuracy, or exact-match without labels.
        choices: Jinja2 template of the list of a row's choices, if they are not in one column.
        normalise: compare choices by the ``sum`` of log p over their tokens, or by the mean (``tokens``).
        max_new_tokens: maximum number of tokens to generate for an answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    data: str | dict[str, str | list[str]] | None = None
    subset: str | None = None
    revision: str | None = None
    rows: dict[str, str] | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    numbers: list[str] | None = None
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    skip_unlabelled: bool | None = None
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
        """Names of the fields that are set."""
        return {name for name, value in self if value is not None}
