"""Inspect a pool: each expert, which of them can be combined, and their Fisher information in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pimerge.adapters.compatibility import (
    check_expert,
    differing_form,
    init_cosine,
    require_alike,
    require_finite,
)
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.selected import distinguished
from pimerge.adapters.shared_modules import require_shared_modules, with_one_prefix
from pimerge.core.errors import PimergeError, Problem
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import Embedding
from pimerge.tasks.task import Task


@dataclass(frozen=True)
class FisherStatistics:
    """Statistics of an expert's diagonal Fisher information F; see :func:`fisher_statistics`.

    Attributes:
        examples, tokens: number of examples and tokens in the estimate.
        labels: ``true`` or ``sampled``.
        trace: ΣF.
        norm: ‖F‖₂.
        largest_share: the largest entry divided by the trace.
        effective: effective number of parameters, (ΣF)² / ΣF²: n if n entries are equal and all others zero.
        effective_share: the effective number divided by the number of parameters.
        modules: module → its part of the trace, in descending order.
    """

    examples: int
    tokens: int
    labels: str
    trace: float
    norm: float
    largest_share: float
    effective: float
    effective_share: float
    modules: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Module → its fraction of the trace, in descending order; 0 if the trace is 0."""
        whole = sum(self.modules.values()) or 1.0
        return {name: value / whole for name, value in self.modules.items()}


def fisher_statistics(entry: Embedding, traces: Mapping[str, float], parameters: int) -> FisherStatistics:
    """Statistics of an expert's Fisher information; shares of a zero trace are 0.

    Args:
        traces: module → its part of the trace.
        parameters: how many the Fisher information is of.
    """
    trace = entry.trace or 1.0
    effective = (entry.trace / entry.norm) ** 2 if entry.norm else 0.0
    return FisherStatistics(
        entry.examples,
        entry.tokens,
        entry.settings.labels,
        entry.trace,
        entry.norm,
        entry.largest / trace,
        effective,
        effective / parameters,
        dict(sorted(traces.items(), key=lambda item: -item[1])),
    )


@dataclass(frozen=True)
class Finding:
    """One line of ``pimerge inspect``.

    Attributes:
        expert: the expert; None if the folder cannot be read.
        problems: problems that prevent embedding or merging.
        ranks_with, merges_with: names of the experts that it can be compared with by Fisher information, or merged.
        not_ranked, not_merged: name → reason, for the other experts.
        fisher: statistics from the store; None if there are none, with the reason in ``no_fisher``.
    """

    path: Path
    expert: Expert | None
    task: Task | None
    problems: tuple[Problem, ...]
    ranks_with: tuple[str, ...]
    merges_with: tuple[str, ...]
    not_ranked: dict[str, str]
    not_merged: dict[str, str]
    fisher: FisherStatistics | None
    no_fisher: str


def inspect(
    references: Sequence[str | Path],
    base: str | None = None,
    store: Store | None = None,
    expert_order: str | None = None,
    config: Path | None = None,
) -> list[Finding]:
    """Inspect experts one by one and in pairs; problems are part of the findings and raise no error.

    Args:
        base: a base model's folder or Hub id, instead of the one that the experts name.
        store: the store with their Fisher information.
        expert_order: how the updates of a mixture's experts are stored, where a config does not say.
        config: the ``adapter_config.json`` of those that are single files; None for the one beside each.
    """
    opened = [_open(reference, base, expert_order, config) for reference in references]
    names = iter(distinguished([one.expert for one in opened if one.expert is not None]))
    opened = [one if one.expert is None else replace(one, expert=next(names)) for one in opened]
    return [_finding(one, [other for other in opened if other is not one], store) for one in opened]


@dataclass(frozen=True)
class _Opened:
    """An expert and its problems; ``unmergeable`` is the first problem that prevents any merge."""

    path: Path
    expert: Expert | None
    task: Task | None = None
    problems: tuple[Problem, ...] = ()
    unmergeable: str = ""


def _open(reference: str | Path, base: str | None, expert_order: str | None, config: Path | None) -> _Opened:
    try:
        expert = open_expert(reference, base, only_look=True, expert_order=expert_order, config=config)
    except PimergeError as error:
        return _Opened(Path(reference), None, None, error.problems, error.problems[0].message)
    try:
        return _Opened(Path(reference), expert, check_expert(expert))
    except PimergeError as error:
        return _Opened(Path(reference), expert, None, error.problems, _why_unmergeable(expert))


def _finding(one: _Opened, others: Sequence[_Opened], store: Store | None) -> Finding:
    not_merged: dict[str, str] = {}
    not_ranked: dict[str, str] = {}
    for other in others:
        if one.expert is None or other.expert is None or other.unmergeable:
            continue
        name = other.expert.name
        not_merged[name] = one.unmergeable or _why_not_merged(one.expert, other.expert)
        if not other.problems:
            own = one.problems[0].message if one.problems else ""
            not_ranked[name] = own or not_merged[name] or _why_not_ranked(one.expert, other.expert)
    fisher = _fisher(one.expert, store)
    return Finding(
        one.path,
        one.expert,
        one.task,
        one.problems,
        tuple(name for name, reason in not_ranked.items() if not reason),
        tuple(name for name, reason in not_merged.items() if not reason),
        {name: reason for name, reason in not_ranked.items() if reason},
        {name: reason for name, reason in not_merged.items() if reason},
        None if isinstance(fisher, str) else fisher,
        fisher if isinstance(fisher, str) else "",
    )


def _fisher(expert: Expert | None, store: Store | None) -> FisherStatistics | str:
    """The store's statistics of an expert, or the reason why there are none."""
    if expert is None or store is None:
        return "it cannot be read" if expert is None else "no store was given"
    name = store.find(str(expert.path.resolve()))
    if name is None:
        return "it is not in the store"
    entry = store.experts[name]
    if (expert.sha256, expert.config_sha256) != (entry.sha256, entry.config_sha256):
        return "changed since it was embedded"
    try:
        return fisher_statistics(entry, store.traces(name), expert.parameters)
    except PimergeError as error:
        return error.problems[0].message


def _why_unmergeable(expert: Expert) -> str:
    """Say why an expert cannot be merged with any other; empty if it can. A merge needs no task."""
    try:
        require_alike([expert])
        require_finite([expert])
    except PimergeError as error:
        return error.problems[0].message
    return ""


def _why_not_merged(expert: Expert, other: Expert) -> str:
    if expert.kind != other.kind and (expert.tensor_sets or other.tensor_sets):
        return f"its kind is {other.kind}, not {expert.kind} ('rank --measure marginals' compares them)"
    try:
        both = with_one_prefix([expert, other])
        require_alike(both)
        require_shared_modules(both)
    except PimergeError as error:
        return error.problems[0].message
    return ""


def _why_not_ranked(expert: Expert, other: Expert) -> str:
    if reason := differing_form(expert, other):
        return reason
    cosine, least = init_cosine(expert, other)
    return "" if cosine >= least else f"its init differs (cosine of the factors A {cosine:.2f})"
