"""A target and a pool → the ranking by the store alone: by similarity, or by the gains that the pool had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to
from pimerge.embedding.store import Store
from pimerge.ranking.measure import BY_STORE, MEASURES, Measure
from pimerge.ranking.nearest import StoreComparison, compare
from pimerge.ranking.selection import (
    LEAST_ERRORS_OF_HISTORY,
    Z95,
    GainEstimate,
    SelectionRule,
    candidate_of,
    document,
    of_first_kind,
    widest_gap,
)


def rank_by_store(store: Store, target: str, measure: Measure, rule: SelectionRule) -> Ranking:
    """Rank the experts of a store by how close they are to one of them.

    Args:
        target: a name in the store.
        measure: one that needs the store alone.
    """
    compared = compare(store, target, measure)
    scores, errors = _scores(compared)
    candidates = [
        Candidate(
            name=name,
            path=relative_to(expert.path, Path()),
            sha256=expert.sha256,
            score=score,
            low=max(-1.0, score - Z95 * error),
            high=min(1.0, score + Z95 * error),
            helps=score > measure.threshold,
        )
        for (name, expert), score, error in zip(compared.experts.items(), scores, errors, strict=True)
    ]
    notes: list[str] = []
    count, helpful = _helpful(candidates, compared.experts, rule, notes)
    if compared.shortlisted_from is not None:
        notes.append(
            f"the {len(candidates) + len(compared.excluded)} nearest of {compared.shortlisted_from} by their "
            "random projections were compared exactly"
        )
    own = store.open(target)
    if compared.experts and (remark := measure.remark([own, *compared.experts.values()])):
        notes.append(remark)
    return document(
        Target(name=target, path=relative_to(own.path, Path()), sha256=own.sha256),
        measure.name,
        count,
        candidates,
        compared.excluded,
        helpful[:count],
        f"of {len(candidates)} comparable experts by '{measure.name}': {measure.summary}",
        notes,
    )


def rank_by_history(
    store: Store,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    measure: Measure,
    rule: SelectionRule,
) -> Ranking:
    """Rank experts by the gains that they had for the other targets of the store.

    Args:
        experts: name → expert of the target's base.
        excluded: name → why it is none of them.
    """
    history = {name: gains for name, gains in store.history().items() if name != target.name}
    if not history:
        raise PimergeError(
            f"the store '{store.path}' has no gains of its experts for each other, or they are out of date",
            "run 'pimerge rank --calibrate' first",
        )
    similarities: dict[str, float] = {}
    if target.expert and target.name in store.experts:
        compared = compare(store, target.name, MEASURES.load(BY_STORE))
        similarities = dict(zip(compared.experts, _scores(compared)[0], strict=True))
    candidates, unknown = [], dict(excluded)
    for name, expert in experts.items():
        found = measure.predict(history, similarities, name)
        if found is None:
            unknown[name] = "it was not there when 'pimerge rank --calibrate' ran"
            continue
        strength, gain, error = found
        error = min(error, 1.0)
        judged = GainEstimate(strength, gain, error, gain, error, least_errors=LEAST_ERRORS_OF_HISTORY)
        candidates.append(candidate_of(name, expert, judged))
    notes: list[str] = []
    count, helpful = _helpful(candidates, experts, rule, notes)
    weighted = "weighted by their similarity to it" if similarities else "weighted alike, since it is not in the store"
    return document(
        target,
        measure.name,
        count,
        candidates,
        unknown,
        helpful[:count],
        f"of {len(candidates)} experts by '{measure.name}': {measure.summary}",
        [f"from the gains for {len(history)} other targets, {weighted}", *notes],
    ).model_copy(update={"base_score": 0.0})


def _helpful(
    candidates: list[Candidate], experts: Mapping[str, Expert], rule: SelectionRule, notes: list[str]
) -> tuple[int, list[Candidate]]:
    """Sort the candidates; how many are selected, and from which."""
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.name))
    every = [candidate for candidate in candidates if candidate.helps or not rule.gate]
    helpful = of_first_kind(every, experts, notes)
    return rule.k if rule.k is not None else widest_gap([candidate.score for candidate in helpful]), helpful


def _scores(compared: StoreComparison) -> tuple[list[float], list[float]]:
    if compared.similarity is None:
        return [], []
    return compared.similarity.scores().tolist(), compared.similarity.errors().tolist()
