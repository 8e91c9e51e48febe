"""Rank a pool by the store alone: by similarity to the target, or by the gains of the experts for other targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking, Target
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to
from pimerge.embedding.store import Store
from pimerge.ranking.measure import BY_STORE, MEASURES, Measure
from pimerge.ranking.nearest import StoreComparison, compare
from pimerge.ranking.selection import (
    LEAST_ERRORS_OF_HISTORY,
    GainEstimate,
    SelectionRule,
    best_first,
    candidate_by_cosine,
    candidate_of,
    ranking_of,
)


def rank_by_store(store: Store, target: str, measure: Measure, rule: SelectionRule) -> Ranking:
    """Rank the experts of a store by their similarity to one of them.

    Args:
        target: the name of an expert in the store.
        measure: a measure of the store.
    """
    compared = compare(store, target, measure)
    scores, errors = _scores(compared)
    candidates = best_first(
        [
            candidate_by_cosine(name, expert.path, expert.sha256, score, error, measure.threshold)
            for (name, expert), score, error in zip(compared.experts.items(), scores, errors, strict=True)
        ]
    )
    notes: list[str] = []
    eligible = rule.eligible(candidates, compared.experts, notes)
    if compared.shortlisted_from is not None:
        notes.append(
            f"the {len(candidates) + len(compared.excluded)} nearest of {compared.shortlisted_from} by their random "
            "projections were compared exactly"
        )
    own = store.open(target)
    if compared.experts and (remark := measure.remark([own, *compared.experts.values()])):
        notes.append(remark)
    reference = Target(name=target, path=relative_to(own.path, Path()), sha256=own.sha256)
    what = f"comparable experts by '{measure.name}'"
    return ranking_of(reference, measure, candidates, compared.excluded, eligible, rule.count(eligible), what, notes)


def rank_by_history(
    store: Store,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    measure: Measure,
    rule: SelectionRule,
) -> Ranking:
    """Rank experts by their measured gains for the other targets of the store.

    Args:
        experts: name → expert on the target's base.
        excluded: name → why the expert is not among them.
        measure: a measure of the history.
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
            unknown[name] = "it was not in the store when 'pimerge rank --calibrate' ran"
            continue
        strength, gain, error = found
        error = min(error, 1.0)
        judged = GainEstimate(strength, gain, error, gain, error, least_errors=LEAST_ERRORS_OF_HISTORY)
        candidates.append(candidate_of(name, expert, judged))
    candidates = best_first(candidates)
    weighted = "weighted by their similarity to it" if similarities else "weighted alike, since it is not in the store"
    notes = [f"from the gains for {len(history)} other targets, {weighted}"]
    eligible = rule.eligible(candidates, experts, notes)
    what = f"experts by '{measure.name}'"
    ranking = ranking_of(target, measure, candidates, unknown, eligible, rule.count(eligible), what, notes)
    return ranking.model_copy(update={"base_score": 0.0})


def _scores(compared: StoreComparison) -> tuple[list[float], list[float]]:
    if compared.similarity is None:
        return [], []
    return compared.similarity.scores().tolist(), compared.similarity.errors().tolist()
