"""Store + measure → which experts help a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from pimerge import strategies
from pimerge.compatibility import differing_form, init_cosine
from pimerge.errors import PimergeError
from pimerge.expert import Expert, open_expert
from pimerge.files import json_text, relative_to, require_absent, write_file
from pimerge.store import Store
from pimerge.task import parse_document

SCHEMA = 1


class Reference(BaseModel):
    """An expert as the ranking names it; ``path`` is relative to the ranking's folder."""

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str
    sha256: str


class Candidate(Reference):
    """An expert with its score; higher is closer."""

    score: float


class NotComparable(BaseModel):
    """An expert that the measure cannot compare with the target, and why."""

    model_config = ConfigDict(extra="forbid")

    name: str
    reason: str


class Ranking(BaseModel):
    """The content of ``ranking.json``: candidates in descending order, the first k selected."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    target: Reference
    measure: str
    k: int
    selected: list[str]
    why: str
    candidates: list[Candidate]
    not_comparable: list[NotComparable]

    def chosen(self) -> list[Candidate]:
        """The selected candidates, closest first."""
        by_name = {candidate.name: candidate for candidate in self.candidates}
        return [by_name[name] for name in self.selected]


def rank(store: Store, target: str, measure: str, k: int, folder: Path) -> Ranking:
    """Rank the experts of a store by their similarity to one of them.

    Args:
        target: a name in the store.
        k: how many to select.
        folder: where the ranking will lie; its paths are relative to that.

    Raises:
        PimergeError: if the measure is not known, k is below 1, or the target itself has changed.
    """
    strategy = strategies.load("measures", measure)
    if k < 1:
        raise PimergeError(f"-k is {k}, expected at least 1")
    own = store.open(target)
    comparable: list[tuple[str, Expert]] = []
    excluded: list[NotComparable] = []
    for name in store.experts:
        if name == target:
            continue
        try:
            expert = store.open(name)
            reason = _difference(store, target, own, name, expert, strategy.NEEDS == "fisher", strategy.SAME_BASIS)
        except PimergeError as error:
            expert, reason = own, error.problems[0].message
        if reason:
            excluded.append(NotComparable(name=name, reason=reason))
        else:
            comparable.append((name, expert))
    scored = _scores(store, strategy, target, own, comparable)
    order = sorted(range(len(comparable)), key=lambda i: (-scored[i], comparable[i][0]))
    candidates = [
        Candidate(
            name=comparable[i][0],
            path=relative_to(comparable[i][1].path, folder),
            sha256=comparable[i][1].sha256,
            score=scored[i],
        )
        for i in order
    ]
    selected = [candidate.name for candidate in candidates[:k]]
    return Ranking(
        target=Reference(name=target, path=relative_to(own.path, folder), sha256=own.sha256),
        measure=measure,
        k=k,
        selected=selected,
        why=f"the {len(selected)} highest scores of {len(candidates)} comparable experts by '{measure}': "
        + strategies.summaries("measures")[measure],
        candidates=candidates,
        not_comparable=excluded,
    )


def write_ranking(ranking: Ranking, path: Path, force: bool) -> None:
    """Write ``ranking.json``; the same ranking again is no overwriting.

    Raises:
        PimergeError: if another ranking is there and ``force`` is off.
    """
    content = json_text(ranking.model_dump())
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        return
    require_absent(path, force)
    write_file(path, content)


def read_ranking(path: Path) -> Ranking:
    """Read a ranking.

    Raises:
        PimergeError: if it is not there or does not fit.
    """
    if not path.is_file():
        raise PimergeError(
            f"there is no ranking '{path}'", "run 'pimerge rank --target NAME' first, or name the experts"
        )
    return parse_document(Ranking, path, "run 'pimerge rank' again")


def open_ranked(reference: Reference, ranking_path: Path, base: str | None = None) -> Expert:
    """Open an expert that a ranking names and check that it is the one that was ranked.

    Raises:
        PimergeError: if it is gone or has changed.
    """
    expert = open_expert(ranking_path.parent / reference.path, base)
    if expert.sha256 != reference.sha256:
        raise PimergeError(
            f"'{expert.path}' has changed since '{ranking_path}' was written",
            "run 'pimerge embed' and 'pimerge rank' again",
        )
    return expert


def _difference(
    store: Store, target: str, own: Expert, name: str, expert: Expert, by_fisher: bool, same_basis: bool
) -> str:
    """Why an expert cannot be compared with the target; empty if it can be."""
    first, second = store.experts[target], store.experts[name]
    if first.base != second.base:
        named = [each.config.get("base_model_name_or_path") for each in (expert, own)]
        return f"its base is {named[0]}, another model than the target's {named[1]}"
    if first.kind != second.kind:
        return f"its kind is {second.kind}, the target's {first.kind}"
    shapes = {n: (m.d_out, m.d_in) for n, m in own.modules.items()}
    if any(shapes.get(n, (m.d_out, m.d_in)) != (m.d_out, m.d_in) for n, m in expert.modules.items()):
        return "its modules have other shapes than the target's"
    if same_basis and (reason := differing_form(own, expert)):
        return reason
    if same_basis:
        cosine, least = init_cosine(own, expert)
        if cosine < least:
            return (
                f"its init differs from the target's (cosine of the factors A {cosine:.2f}, "
                f"a shared init has at least {least:.2f}); '--measure delta' does not depend on it"
            )
    if by_fisher and first.settings.labels != second.settings.labels:
        return f"its Fisher has {second.settings.labels} labels, the target's {first.settings.labels}"
    return ""


def _scores(
    store: Store, strategy: Any, target: str, own: Expert, comparable: Sequence[tuple[str, Expert]]
) -> list[float]:
    if not comparable:
        return []
    if strategy.NEEDS == "delta":
        found: list[float] = strategy.scores(own, [expert for _, expert in comparable])
    else:
        found = strategy.scores(store.diagonal(target), [store.diagonal(name) for name, _ in comparable])
    if not torch.tensor(found).isfinite().all():
        raise PimergeError(
            f"the scores of the target '{target}' are not finite", "embed the pool again: pimerge embed --force"
        )
    return found
