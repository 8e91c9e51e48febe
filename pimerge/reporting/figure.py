"""The family of figures: each has the source of its data, the type of the data and a function that draws it.

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
        experts: names in the store or the ranking, or folders; empty selects all.
        target: an expert's or a task's folder; None uses the ranking's target.
        path: the data of the figure ``path``.
        comparison: the file that ``pimerge compare`` wrote.
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
    """Base class of the data of figures and its parts, which is written to and read from JSON.

    Unknown fields and numbers that are not finite are rejected on reading.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}


Source = TypeVar("Source")
Data = TypeVar("Data", bound=FigureData)


@dataclass(frozen=True, kw_only=True)
class Figure(Strategy, Generic[Source, Data]):
    """One figure of ``pimerge plot``.

    Attributes:
        data: the type of the figure's data.
        inputs: fields of :class:`FigureInputs` that it reads, besides ``track`` and ``note``.
        open: opens the source of the data.
        collect: ``collect(source, inputs, **options)`` computes the data with the figure's own options.
        draw: draws the data.
    """

    data: type[Data]
    inputs: tuple[str, ...]
    open: Callable[[FigureInputs], Source]
    collect: Callable[..., Data]
    draw: Callable[[Data], Drawing]

    def compute(self, source: Source, inputs: FigureInputs | None = None, **given: Any) -> Data:
        """Compute the data from its open source; options that are missing or None have the figure's defaults."""
        options = {**self.defaults, **FIGURES.given_options(self, given)}
        return self.collect(source, inputs or FigureInputs(), **options)

    def document(self, data: Data) -> dict[str, Any]:
        """Return the JSON document of the data with the name of the figure."""
        return {"figure": self.name, **asdict(data)}

    def read(self, path: Path) -> Data:
        """Read data of this figure from a file; data of another figure is rejected."""
        from pydantic import TypeAdapter, ValidationError

        content = read_json(path)
        own = content.pop("figure", None) if isinstance(content, dict) else None
        if own != self.name:
            found = (
                f"holds the data of the plot '{own}'" if isinstance(own, str) else "does not hold the data of a plot"
            )
            raise PimergeError(
                f"'{path}' {found}; expected data of '{self.name}'", f"'pimerge plot {self.name}' writes such a file"
            )
        problems = Problems()
        try:
            return TypeAdapter(self.data).validate_python(content)
        except ValidationError as error:
            for fault in error.errors():
                field = ".".join(map(str, fault["loc"])) or "the document"
                problems.add(f"'{path}': {field}: {fault['msg']}", f"run 'pimerge plot {self.name}' again")
        problems.raise_any(f"'{path}' is not valid")
        raise AssertionError("unreachable: a problem was raised")


FIGURES: Family[Figure[Any, Any]] = Family("pimerge.reporting.figures", "plot", "FIGURE", Figure)
