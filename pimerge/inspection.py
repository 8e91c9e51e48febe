"""What each expert of a pool is, and which of them go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pimerge.compatibility import check_expert, differing_form, init_cosine, require_alike, require_finite
from pimerge.errors import PimergeError, Problem
from pimerge.expert import Expert, open_expert
from pimerge.task import Task


@dataclass(frozen=True)
class Finding:
    """One line of ``pimerge inspect``.

    Attributes:
        expert: None if the folder cannot be read as one.
        problems: what keeps it from being embedded or merged.
        ranks_with, merges_with: names of the others that it can be compared with by its Fisher, and merged with.
        not_ranked, not_merged: name → reason, for the rest.
    """

    path: Path
    expert: Expert | None
    task: Task | None
    problems: tuple[Problem, ...]
    ranks_with: tuple[str, ...]
    merges_with: tuple[str, ...]
    not_ranked: dict[str, str]
    not_merged: dict[str, str]


def inspect(references: Sequence[str | Path], base: str | None = None) -> list[Finding]:
    """Look at experts one by one and in pairs; problems are findings, not errors."""
    opened = [_open(reference, base) for reference in references]
    names = Counter(one.expert.name for one in opened if one.expert is not None)
    return [_finding(one, [other for other in opened if other is not one], names) for one in opened]


@dataclass(frozen=True)
class _Opened:
    """One expert and its own problems; ``unmergeable`` is the first that keeps it from being merged."""

    path: Path
    expert: Expert | None
    task: Task | None = None
    problems: tuple[Problem, ...] = ()
    unmergeable: str = ""


def _open(reference: str | Path, base: str | None) -> _Opened:
    try:
        expert = open_expert(reference, base)
    except PimergeError as error:
        return _Opened(Path(reference), None, None, error.problems, error.problems[0].message)
    try:
        return _Opened(Path(reference), expert, check_expert(expert))
    except PimergeError as error:
        return _Opened(Path(reference), expert, None, error.problems, _why_unmergeable(expert))


def _finding(one: _Opened, others: Sequence[_Opened], names: Mapping[str, int]) -> Finding:
    not_merged: dict[str, str] = {}
    not_ranked: dict[str, str] = {}
    for other in others:
        if one.expert is None or other.expert is None or other.unmergeable:
            continue
        name = other.expert.name if names[other.expert.name] == 1 else str(other.path)
        not_merged[name] = one.unmergeable or _why_not_merged(one.expert, other.expert)
        if not other.problems:
            own = one.problems[0].message if one.problems else ""
            not_ranked[name] = own or not_merged[name] or _why_not_ranked(one.expert, other.expert)
    return Finding(
        one.path,
        one.expert,
        one.task,
        one.problems,
        tuple(name for name, reason in not_ranked.items() if not reason),
        tuple(name for name, reason in not_merged.items() if not reason),
        {name: reason for name, reason in not_ranked.items() if reason},
        {name: reason for name, reason in not_merged.items() if reason},
    )


def _why_unmergeable(expert: Expert) -> str:
    """What keeps an expert from being merged with any other; a merge needs no task."""
    try:
        require_alike([expert])
        require_finite([expert])
    except PimergeError as error:
        return error.problems[0].message
    return ""


def _why_not_merged(expert: Expert, other: Expert) -> str:
    try:
        require_alike([expert, other])
    except PimergeError as error:
        return error.problems[0].message
    return ""


def _why_not_ranked(expert: Expert, other: Expert) -> str:
    if reason := differing_form(expert, other):
        return reason
    cosine, least = init_cosine(expert, other)
    return "" if cosine >= least else f"its init differs (cosine of the factors A {cosine:.2f})"
