"""A figure: where its data comes from, what the data is, and how it is drawn; and the family of all figures.

A file of ``figures/`` imports matplotlib, numpy and torch only inside functions, so that listings and ``--help`` stay
fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json
from pimerge.core.plugins import Family, Strategy
from pimerge.core.progress import Note, Track, silent, unheard

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True, kw_only=True)
class FigureInputs:
    """The inputs of a figure: documents of other commands, experts, and the device of a model.

    Attributes:
        experts: names in the store or the ranking, or folders; empty for all.
        target: an expert's or a task's folder; None for the ranking's target.
        path: the data of the figure that shows paths between experts.
        comparison: what ``pimerge compare`` wrote.
        tuned: the folder that ``pimerge tune`` wrote.
    """

    experts: tuple[str, ...] = ()
    target: str | None = None
    store: Path = Path("embeddings.json")
    ranking: Path = Path("ranking.json")
    path: Path = Path("path.json")
    comparison: Path = Path("comparison.json")
    tuned: Path = Path("tuned")
    base: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    track: Track = silent
    note: Note = unheard


@dataclass(frozen=True, kw_only=True)
class FigureData:
    """Base of what figures show, and of its parts: plain data that is written as JSON and read again.

    Fields that do not belong to it and numbers that are not finite are refused when it is read.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}


Source = TypeVar("Source")
Data = TypeVar("Data", bound=FigureData)


@dataclass(frozen=True, kw_only=True)
class Figure(Strategy, Generic[Source, Data]):
    """One figure of ``pimerge plot``.

    Attributes:
        data: the type of the figure's data.
        inputs: the fields of :class:`FigureInputs` that it reads, besides ``track`` and ``note``.
        open: opens what the figure is made from.
        collect: ``collect(source, inputs, **options)`` computes the data; the options are those of the figure.
        draw: draws the data.
    """

    data: type[Data]
    inputs: tuple[str, ...]
    open: Callable[[FigureInputs], Source]
    collect: Callable[..., Data]
    draw: Callable[[Data], Drawing]

    def compute(self, source: Source, inputs: FigureInputs | None = None, **given: Any) -> Data:
        """Compute the data from opened inputs; options that are not given, or None, have the figure's defaults."""
        options = {**self.defaults, **FIGURES.given_options(self, given)}
        return self.collect(source, inputs or FigureInputs(), **options)

    def document(self, data: Data) -> dict[str, Any]:
        """The JSON document of the data; it names the figure."""
        return {"figure": self.name, **asdict(data)}

    def read(self, path: Path) -> Data:
        """Read data that the figure wrote before. The data of another figure is refused."""
        from pydantic import TypeAdapter, ValidationError

        content = read_json(path)
        own = content.pop("figure", None) if isinstance(content, dict) else None
        if own != self.name:
            found = (
                f"holds the data of the plot '{own}'" if isinstance(own, str) else "does not hold the data of a plot"
            )
            raise PimergeError(
                f"'{path}' {found}; expected that of '{self.name}'", f"'pimerge plot {self.name}' writes such a file"
            )
        problems = Problems()
        try:
            return TypeAdapter(self.data).validate_python(content)
        except ValidationError as error:
            for fault in error.errors():
                field = ".".join(map(str, fault["loc"])) or "the document"
                problems.add(f"'{path}': {field}: {fault['msg']}", f"run 'pimerge plot {self.name}' again")
        problems.raise_any(f"'{path}' does not fit")
        raise AssertionError("unreachable: a problem was raised")


FIGURES: Family[Figure[Any, Any]] = Family("pimerge.reporting.figures", "plot", "FIGURE", Figure)
