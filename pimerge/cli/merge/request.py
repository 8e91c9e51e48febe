"""What the user asked ``pimerge merge`` for, and what every kind of merge reads from it in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    import torch

    from pimerge.adapters.low_rank import Truncation
    from pimerge.merging.method import OpenedMethod


@dataclass(frozen=True)
class Request:
    """The options of ``pimerge merge``, as they were given."""

    experts: list[str] | None
    method: str
    options: Mapping[str, Any]
    weights: str | None
    rules: Sequence[str]
    alpha: float | None
    coefficients: Path | None
    space: str
    seed: int
    rank: str
    energy: float | None
    include: Sequence[str]
    exclude: Sequence[str]
    head: str
    dtype: str | None
    into: Path | None
    fisher: Sequence[Path]
    store: Path
    dry_run: bool
    verify: bool
    target: str | None
    ranking: Path
    base: str | None
    output: Path
    force: bool
    json: bool
    quiet: bool

    def open_method(self) -> OpenedMethod:
        """The method with its options."""
        from pimerge.merging.method import open_method

        return open_method(self.method, self.options, self.seed)

    def truncation(self) -> Truncation:
        """What ``--rank`` and ``--energy`` say together."""
        from pimerge.adapters.low_rank import DEFAULT_ENERGY, Truncation
        from pimerge.cli.inputs import parse_rank

        if self.rank == "auto":
            return Truncation(None, DEFAULT_ENERGY if self.energy is None else self.energy)
        return Truncation(parse_rank(self.rank), self.energy)

    def torch_dtype(self) -> torch.dtype | None:
        """The dtype asked for; None for the experts' own."""
        import torch

        known = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float64": torch.float64,
        }
        if self.dtype is not None and self.dtype not in known:
            raise PimergeError(f"--dtype is '{self.dtype}'", f"expected {', '.join(known)}")
        return known[self.dtype] if self.dtype else None

    def selects(self, name: str) -> bool:
        """Whether ``--include`` and ``--exclude`` leave a module or tensor in."""
        wanted = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return wanted and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def require_globs_match(self, names: Sequence[str]) -> None:
        """Refuse a glob that matches no name: it is a slip.

        Raises:
            PimergeError: with each such glob.
        """
        problems = Problems()
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    problems.add(f"{option} '{glob}' matches none of {len(names)} names", f"they are like '{names[0]}'")
        problems.raise_any("globs that match nothing")


def with_ranked_state_dicts(request: Request) -> Request:
    """The request with the files that a ranking of plain state dicts selected, if no others are given.

    As of adapters, the target's own is among them for 'interpolated' and 'fisher', and its share in 'interpolated' is
    1/(k+1), the others divide the rest by the softmax of their scores.

    Raises:
        PimergeError: if one of the files has changed.
    """
    if request.experts or request.coefficients is not None or not request.ranking.is_file():
        return request
    from pimerge.adapters.ranking_document import read_ranking
    from pimerge.core.files import sha256_file
    from pimerge.merging.weights import shares

    ranking = read_ranking(request.ranking)
    chosen, target = ranking.chosen(), ranking.target
    if not chosen or not all(candidate.path.endswith(".safetensors") for candidate in chosen):
        return request
    joined = request.open_method().strategy.joins_target
    members = [target, *chosen] if joined else chosen
    problems = Problems()
    for member in members:
        path = request.ranking.parent / member.path
        if not path.is_file() or sha256_file(path) != member.sha256:
            state = "has changed" if path.is_file() else "is gone"
            problems.add(f"'{path}' {state} since '{request.ranking}' was written", "run 'pimerge rank' again")
    problems.raise_any("the state dicts of the ranking cannot be merged")
    weights = request.weights
    if weights is None and request.method == "interpolated" and not request.rules:
        scores = [None, *(candidate.score for candidate in chosen)]
        own = [member.sha256 for member in members]
        weights = ",".join(map(repr, shares(own, target.sha256, scores, None, by_score=True) or []))
    paths = [str(request.ranking.parent / member.path) for member in members]
    return replace(request, experts=paths, weights=weights)
