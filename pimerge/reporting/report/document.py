"""The content of a report: sections with tables, pictures, sentences, and commands for what is missing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat


class Cell(BaseModel):
    """One field of a table; ``value`` is what it is sorted by, where that is a number."""

    model_config = ConfigDict(extra="forbid")

    text: str
    value: FiniteFloat | None = None


class Table(BaseModel):
    """Rows of cells under named columns.

    Attributes:
        numbers: which columns hold numbers.
        left_out: how many rows are not shown.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    columns: list[str]
    numbers: list[bool]
    rows: list[list[Cell]]
    left_out: int = 0


class Picture(BaseModel):
    """A plot: its file in the folder, and what it shows."""

    model_config = ConfigDict(extra="forbid")

    file: str
    title: str
    alt: str


class LongText(BaseModel):
    """A longer text that is shown when it is asked for."""

    model_config = ConfigDict(extra="forbid")

    title: str
    content: str


class Section(BaseModel):
    """A part of the report.

    Attributes:
        sentences: what a reader should know first.
        problems: what lies in the folder and cannot be shown.
        missing: what could be here, and the command that makes it.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    sentences: list[str] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    texts: list[LongText] = Field(default_factory=list)
    problems: list[str] = Field(default_factory=list)
    missing: list[tuple[str, str]] = Field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the section has nothing to show except what is missing."""
        return not (self.tables or self.pictures or self.problems)


class Report(BaseModel):
    """The whole of it; ``folder`` is the folder's name."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    version: str
    sections: list[Section]
