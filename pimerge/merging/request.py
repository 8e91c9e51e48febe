"""The request for a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError, Problems
from pimerge.core.plugins import Option
from pimerge.core.progress import Note, Track, silent, unheard

if TYPE_CHECKING:
    import torch

    from pimerge.adapters.expert import Expert
    from pimerge.adapters.low_rank import Truncation
    from pimerge.adapters.ranking_document import Ranking

AUTO_ENERGY = 0.99
"""Share of ‖ΔW‖² that ``rank="auto"`` keeps where no other is given."""


class EntrySpace(StrEnum):
    """Where an elementwise method looks at entries.

    ``CORE``: in the experts' own singular vectors, without a dense matrix. ``DELTA``: in the dense ΔW, one module at a
    time. ``FACTORS``: in A and B separately, as PEFT does, for experts of one init.
    """

    CORE = "core"
    DELTA = "delta"
    FACTORS = "factors"


class HeadPolicy(StrEnum):
    """Which task head the result has: the target's own, the mean of all, or none."""

    TARGET = "target"
    AVERAGE = "average"
    NONE = "none"


class ResultDtype(StrEnum):
    """The dtypes that a result can have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


SPACE = Option(
    "space",
    EntrySpace,
    "Basis of elementwise methods: core (in the experts' own singular vectors, without a dense matrix), "
    "delta (in the dense ΔW, one module at a time) or factors (in A and B separately, as PEFT does: fast, and only for "
    "experts of one init).",
)
HEAD = Option("head", HeadPolicy, "Task head of the result: the target's, the average, or none.")
DTYPE = Option("dtype", ResultDtype, "Dtype of the result. Default: the experts' own.")


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """The arguments of :func:`pimerge.merge`, where they are described, but for its method.

    Attributes:
        dry_run: only the plan is wanted; files of experts are read, nothing is written.
    """

    experts: Sequence[str | Path | Expert] | None = None
    weights: Sequence[float] | None = None
    rules: Sequence[str] = ()
    alpha: float | None = None
    coefficients: Path | None = None
    space: EntrySpace = EntrySpace.CORE
    rank: int | str = "max"
    energy: float | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    head: HeadPolicy = HeadPolicy.TARGET
    dtype: ResultDtype | None = None
    into: Path | None = None
    fisher: Sequence[Path] = ()
    store: Path = Path("embeddings.json")
    verify: bool = False
    target: str | None = None
    ranking: Path | Ranking = Path("ranking.json")
    base: str | None = None
    output: Path | None = None
    force: bool = False
    dry_run: bool = False
    track: Track = silent
    note: Note = unheard

    @property
    def ranking_path(self) -> Path:
        """The file of the ranking."""
        return self.ranking if isinstance(self.ranking, Path) else self.ranking.path

    @property
    def folder(self) -> Path:
        """The folder that the paths in written files are relative to."""
        return self.output or Path()

    def truncation(self) -> Truncation:
        """What ``rank`` and ``energy`` say together."""
        from pimerge.adapters.low_rank import Truncation

        if self.rank == "auto":
            return Truncation(None, AUTO_ENERGY if self.energy is None else self.energy)
        if self.rank != "max" and not (str(self.rank).isdecimal() and int(self.rank) > 0):
            raise PimergeError(f"--rank is '{self.rank}'", "expected a positive integer, max or auto")
        return Truncation(None if self.rank == "max" else int(self.rank), self.energy)

    def torch_dtype(self) -> torch.dtype | None:
        """The dtype asked for; None for the experts' own."""
        import torch

        return getattr(torch, self.dtype) if self.dtype else None

    def selects(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` leave a module or tensor in."""
        wanted = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return wanted and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def require_globs_match(self, names: Sequence[str]) -> None:
        """Refuse globs that match no name."""
        problems = Problems()
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    problems.add(f"{option} '{glob}' matches none of {len(names)} names", f"they are like '{names[0]}'")
        problems.raise_any("globs that match nothing")

    def problems_for_updates_only(self, why: str) -> Problems:
        """A problem for each argument that was given and is for updates ΔW alone.

        Args:
            why: the sentence that follows the option's flag.
        """
        given = {
            "--rank": self.rank != "max",
            "--energy": self.energy is not None,
            "--space": self.space is not EntrySpace.CORE,
            "--into": self.into is not None,
            "--verify": self.verify,
        }
        problems = Problems()
        for option in [option for option, is_given in given.items() if is_given]:
            problems.add(f"{option} {why}", "leave it out")
        return problems
