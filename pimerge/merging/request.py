"""The request of a merge: the arguments of ``pimerge.merge``, checked and converted."""

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
    from pimerge.tasks.task import Task

AUTO_ENERGY = 0.99
"""Share of ‖ΔW‖² that ``rank="auto"`` keeps if ``energy`` is not given."""


class EntrySpace(StrEnum):
    """The entries that an elementwise method works on.

    ``CORE``: in the basis of the experts' singular vectors, without a dense matrix. ``DELTA``: in the dense ΔW, one
    module at a time. ``FACTORS``: in A and B separately, as in PEFT, for experts with the same init.
    """

    CORE = "core"
    DELTA = "delta"
    FACTORS = "factors"


class HeadPolicy(StrEnum):
    """The task head of the result: the target's own, the mean of all, or none."""

    TARGET = "target"
    AVERAGE = "average"
    NONE = "none"


class ResultDtype(StrEnum):
    """The possible dtypes of a result."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


SPACE = Option(
    "space",
    EntrySpace,
    "Entries that elementwise methods work on: core (in the basis of the experts' singular vectors), delta (in the "
    "dense ΔW, one module at a time) or factors (in A and B separately, as in PEFT; needs experts with the same init).",
)
HEAD = Option("head", HeadPolicy, "Task head of the result: the head of the target, the average, or none.")
DTYPE = Option("dtype", ResultDtype, "Dtype of the result. Default: the dtype of the experts.")


@dataclass(frozen=True, kw_only=True)
class ResultRequest:
    """The arguments of every function that writes a LoRA: which modules, their rank, and where to."""

    rank: int | str = "max"
    energy: float | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: ResultDtype | None = None
    output: Path | None = None
    force: bool = False
    track: Track = silent
    note: Note = unheard

    @property
    def folder(self) -> Path:
        """The output, which paths in written files are relative to."""
        return self.output or Path()

    def truncation(self) -> Truncation:
        """Return the truncation that ``rank`` and ``energy`` define together."""
        from pimerge.adapters.low_rank import Truncation

        if self.rank == "auto":
            return Truncation(None, AUTO_ENERGY if self.energy is None else self.energy)
        if self.rank != "max" and not (str(self.rank).isdecimal() and int(self.rank) > 0):
            raise PimergeError(f"--rank is '{self.rank}'", "expected a positive integer, max or auto")
        return Truncation(None if self.rank == "max" else int(self.rank), self.energy)

    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype of the result; None for the dtype of the experts."""
        import torch

        return getattr(torch, self.dtype) if self.dtype else None

    def selects(self, name: str) -> bool:
        """Whether a module or tensor is merged according to ``include`` and ``exclude``."""
        wanted = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return wanted and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def require_globs_match(self, names: Sequence[str]) -> None:
        """Refuse globs that match none of the names."""
        problems = Problems()
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    problems.add(f"{option} '{glob}' matches none of {len(names)} names, such as '{names[0]}'")
        problems.raise_any("some globs match nothing")


@dataclass(frozen=True, kw_only=True)
class MergeRequest(ResultRequest):
    """The arguments of :func:`pimerge.merge` except the method; they are described there."""

    experts: Sequence[str | Path | Expert] | None = None
    weights: Sequence[float] | None = None
    rules: Sequence[str] = ()
    alpha: float | None = None
    coefficients: Path | None = None
    space: EntrySpace = EntrySpace.CORE
    head: HeadPolicy = HeadPolicy.TARGET
    expert_order: str | None = None
    into: Path | None = None
    dequantize: bool = False
    allow_disjoint: bool = False
    fisher: Sequence[Path] = ()
    store: Path = Path("embeddings.json")
    verify: bool = False
    target: str | Path | Expert | Task | None = None
    ranking: Path | Ranking = Path("ranking.json")
    base: str | None = None
    config: Path | None = None

    @property
    def converts(self) -> bool:
        """Whether experts that need the base's weights, such as DoRA, are converted; ``into`` is the base as well."""
        return self.base is not None or self.into is not None

    @property
    def ranking_path(self) -> Path:
        """The file of the ranking."""
        return self.ranking if isinstance(self.ranking, Path) else self.ranking.path

    def problems_for_updates_only(self, why: str) -> Problems:
        """Return a problem for each given option that applies only to updates ΔW.

        Args:
            why: the rest of the message, after the option.
        """
        given = {
            "--rank": self.rank != "max",
            "--energy": self.energy is not None,
            "--space": self.space is not EntrySpace.CORE,
            "--verify": self.verify,
        }
        problems = Problems()
        for option, is_given in given.items():
            if is_given:
                problems.add(f"{option} {why}", f"leave out {option}")
        return problems
