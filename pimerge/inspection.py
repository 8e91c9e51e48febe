"""What each expert of a pool is, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pimerge.compatibility import check_expert, differing_form, init_cosine, require_alike
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
    usable = [expert for expert, _, problems in opened if expert is not None and not problems]
    findings = []
    for reference, (expert, task, problems) in zip(references, opened, strict=True):
        others = [other for other in usable if expert is not None and other is not expert]
        mergeable = {other.name: _why_not_merged(expert, other) for other in others if expert is not None}
        rankable = {
            other.name: mergeable[other.name] or _why_not_ranked(expert, other)
            for other in others
            if expert is not None
        }
        if problems:
            mergeable = dict.fromkeys(mergeable, problems[0].message)
            rankable = dict.fromkeys(rankable, problems[0].message)
        findings.append(
            Finding(
                Path(reference),
                expert,
                task,
                problems,
                tuple(name for name, reason in rankable.items() if not reason),
                tuple(name for name, reason in mergeable.items() if not reason),
                {name: reason for name, reason in rankable.items() if reason},
                {name: reason for name, reason in mergeable.items() if reason},
            )
        )
    return findings


def _open(reference: str | Path, base: str | None) -> tuple[Expert | None, Task | None, tuple[Problem, ...]]:
    try:
        expert = open_expert(reference, base)
    except PimergeError as error:
        return None, None, error.problems
    try:
        return expert, check_expert(expert), ()
    except PimergeError as error:
        return expert, None, error.problems


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
