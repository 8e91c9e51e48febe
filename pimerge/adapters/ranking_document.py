"""``ranking.json``: the ranked experts of a target, their scores, and the selected ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError
from pimerge.core.files import json_text, relative_to, write_file
from pimerge.core.replacing import require_same_or_absent
from pimerge.tasks.task import Task

SCHEMA = 2


class Reference(BaseModel):
    """An expert in a ranking; ``path`` is relative to the ranking's folder."""

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str
    sha256: str


AnyReference = TypeVar("AnyReference", bound=Reference)


class Target(Reference):
    """The target of a ranking.

    Attributes:
        expert: False for a task without an expert of its own; ``path`` and ``sha256`` then refer to the task.
    """

    expert: bool = True


class Candidate(Reference):
    """An expert with its score; higher is better.

    Attributes:
        low, high: 95 % interval of the score.
        scale: the best strength of the expert for the target, 0 to 1; merge and tune apply it.
        gain: expected gain in accuracy over the bare base (0 to 1), with its 95 % interval; None if it is unknown.
        helps: whether it is expected to improve on the bare base.
    """

    score: float
    low: float
    high: float
    scale: float = 1.0
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    helps: bool = True


class NotComparable(BaseModel):
    """An expert that the measure cannot compare with the target, and why."""

    model_config = ConfigDict(extra="forbid")

    name: str
    reason: str


class Seen(BaseModel):
    """The target's examples that were used: their number, and how they were sampled."""

    model_config = ConfigDict(extra="forbid")

    examples: int
    per_class: dict[str, int]
    shots: int | None
    limit: int | None
    seed: int


class Ranking(BaseModel):
    """The content of ``ranking.json``: candidates in descending order, and the selected ones among them.

    Attributes:
        base_score: score of the bare base; None for a measure that compares stored embeddings.
        seen: the target's examples that were used; None for a measure that compares stored embeddings.
        selected: names of the selected experts; empty if no expert is expected to help, so that a fresh expert is
            recommended.
        notes: remarks for the reader, one sentence each.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    target: Target
    measure: str
    k: int
    selected: list[str]
    why: str
    notes: list[str] = Field(default_factory=list)
    base_score: float | None = None
    seen: Seen | None = None
    candidates: list[Candidate]
    not_comparable: list[NotComparable]
    _path: Path = PrivateAttr(default=Path("ranking.json"))
    _task: Task | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        """The file that it was read from or will be written to; the paths of experts are relative to its folder."""
        return self._path

    def at(self, path: Path) -> Ranking:
        """A copy whose paths of experts are read relative to the folder of another file."""
        ranking = self.model_copy()
        ranking._path = path
        return ranking

    @property
    def task(self) -> Task | None:
        """The target's task, if it was given as rows in memory or as an open task: no file holds it."""
        return self._task

    def with_task(self, task: Task | None) -> Ranking:
        """The same ranking for a task that is open."""
        ranking = self.model_copy()
        ranking._task = task
        return ranking

    def to_dict(self) -> dict[str, Any]:
        """The content of ``ranking.json``."""
        return self.model_dump()

    def save(self, path: str | Path, *, force: bool = False) -> Ranking:
        """Write ``ranking.json``; the same ranking may be written again.

        Args:
            force: replace another ranking.

        Returns:
            the written ranking, with paths relative to the folder of that file.
        """
        path = Path(path)
        old, new = self.path.parent, path.parent

        def moved(reference: AnyReference) -> AnyReference:
            return reference.model_copy(update={"path": relative_to(old / reference.path, new)})

        update = {"target": moved(self.target), "candidates": [moved(each) for each in self.candidates]}
        written = self.model_copy(update=update).at(path)
        content = json_text(written.to_dict())
        require_same_or_absent(path, content, force)
        write_file(path, content)
        return written

    def with_notes(self, *notes: str) -> Ranking:
        """A copy with further notes before its own."""
        return self.model_copy(update={"notes": [*notes, *self.notes]})

    def chosen(self) -> list[Candidate]:
        """The selected candidates, best first."""
        by_name = {candidate.name: candidate for candidate in self.candidates}
        return [by_name[name] for name in self.selected]


def read_ranking(path: Path) -> Ranking:
    """Read a ranking."""
    if not path.is_file():
        raise PimergeError(
            f"there is no ranking '{path}'", "run 'pimerge rank --target NAME' first, or name the experts"
        )
    return parse_document(Ranking, path, "run 'pimerge rank' again").at(path)


def open_ranked(reference: Reference, ranking_path: Path, base: str | None = None) -> Expert:
    """Open an expert of a ranking at its strength, and check that it has not changed since."""
    expert = open_expert(ranking_path.parent / reference.path, base)
    if expert.sha256 != reference.sha256:
        raise PimergeError(
            f"'{expert.path}' has changed since '{ranking_path}' was written",
            "run 'pimerge embed' and 'pimerge rank' again",
        )
    expert = expert if expert.name == reference.name else replace(expert, label=reference.name)
    return expert.with_strength(reference.scale) if isinstance(reference, Candidate) else expert
