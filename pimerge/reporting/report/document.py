"""Content of a report: sections with tables, pictures, sentences, and commands that create missing content."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat


class Cell(BaseModel):
    """A cell of a table; ``value`` is the number by which rows are sorted, if it is numeric."""

    model_config = ConfigDict(extra="forbid")

    text: str
    value: FiniteFloat | None = None


class Table(BaseModel):
    """Rows of cells under named columns.

    Attributes:
        numbers: for each column, whether it holds numbers.
        left_out: number of rows that are not shown.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    columns: list[str]
    numbers: list[bool]
    rows: list[list[Cell]]
    left_out: int = 0


class Picture(BaseModel):
    """A plot: its file in the folder, its title and its description."""

    model_config = ConfigDict(extra="forbid")

    file: str
    title: str
    alt: str


class LongText(BaseModel):
    """A longer text that the reader can unfold."""

    model_config = ConfigDict(extra="forbid")

    title: str
    content: str


class Section(BaseModel):
    """A part of the report.

    Attributes:
        sentences: remarks that stand first.
        problems: why some content of the folder cannot be shown.
        missing: descriptions of missing content, each with the command that creates it.
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
        """Whether the section shows nothing except a list of missing content."""
        return not (self.tables or self.pictures or self.problems)


class Report(BaseModel):
    """A report on the folder of the name ``folder``."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    version: str
    sections: list[Section]
