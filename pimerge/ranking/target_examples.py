"""Rank the experts of a store by a target's examples."""

from __future__ import annotations

from contextlib import suppress

from pimerge.adapters.ranking_document import Ranking
from pimerge.core.errors import PimergeError
from pimerge.embedding.features import FeatureReader, Sampling, why_not
from pimerge.embedding.store import Store
from pimerge.embedding.strengths import STRENGTHS
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.ranking.by_examples import gains_by_strength, rank_by_examples
from pimerge.ranking.measure import BY_EXAMPLES, BY_STORE, MEASURES, Measure
from pimerge.ranking.measures.combined import store_weight
from pimerge.ranking.nearest import SHORTLIST, by_projection, compare
from pimerge.ranking.own_expert import store_with_target
from pimerge.ranking.target import RankRequest, RankTarget, names_on, open_all, pool_base

LEAST_WEIGHT = 0.01
"""Smallest weight of the store's prediction in an expected gain; below it the store is not read."""


def by_default(target: RankTarget, store: Store, request: RankRequest) -> Ranking | str:
    """Rank by the default measure of examples, or say why the store has to be used."""
    resolve_dtype(request.dtype, resolve_device(request.device))  # wrong options are refused first
    try:
        if reason := why_not(target.task()):
            return reason
        reader = feature_reader(target, store, request)
        if target.expert is not None and not reader.holds_out:
            return "one example per class is too few"
        return _ranked(reader, target, store, MEASURES.load(BY_EXAMPLES), request)
    except PimergeError as error:
        if target.expert is None or request.shots is not None:
            raise
        return f"the target's examples cannot be used ({error.problems[0].message})"


def by_examples(target: RankTarget, store: Store, measure: Measure, request: RankRequest) -> Ranking:
    """Rank by a measure of the target's examples."""
    return _ranked(feature_reader(target, store, request), target, store, measure, request)


def _ranked(reader: FeatureReader, target: RankTarget, store: Store, measure: Measure, request: RankRequest) -> Ranking:
    """Try the experts on the examples; of a large store only those with the nearest random projections."""
    names, others = names_on(store, target, reader.base)
    notes = []
    if len(names) > SHORTLIST:
        with suppress(PimergeError):  # if projections cannot be compared, all experts are tried
            nearest = _nearest(target, store, names, request)
            notes.append(f"of {len(names)} experts, the {SHORTLIST} with the nearest random projections were tried")
            names = nearest
    experts, broken = open_all(store, names)
    prior = _predicted_by_store(target, store, reader)
    if prior:
        notes.append("its expert in the store saw more examples, so similarity to that expert is taken into account")
    with request.track("candidates", (1 + len(experts) * len(STRENGTHS)) * len(reader.labels), "examples") as advance:
        reader.advance = advance
        excluded, own = others | broken, target.expert
        ranking = rank_by_examples(reader, experts, excluded, target.reference(), own, measure, request.rule, prior)
    return ranking.with_notes(*notes)


def _predicted_by_store(target: RankTarget, store: Store, reader: FeatureReader) -> dict[str, float]:
    """Return name → gain at full strength that the store predicts; empty if it adds nothing to the examples."""
    if not target.stored:
        return {}
    classes = len(set(reader.labels.tolist()))
    weight = store_weight(len(reader.labels) / classes, store.experts[target.name].examples / classes)
    if weight < LEAST_WEIGHT:
        return {}
    compared = compare(store, target.name, MEASURES.load(BY_STORE))
    scores = [] if compared.similarity is None else compared.similarity.scores().tolist()
    return {name: weight * score for name, score in zip(compared.experts, scores, strict=True)}


def gains_of(target: RankTarget, store: Store, name: str, request: RankRequest) -> dict[float, dict[str, float]]:
    """Return strength of a candidate → measure of examples → its value minus that of the bare base."""
    reader = feature_reader(target, store, request)
    return gains_by_strength(reader, store.open(name), _predicted_by_store(target, store, reader).get(name, 0.0))


def feature_reader(target: RankTarget, store: Store, request: RankRequest) -> FeatureReader:
    """Return the reader of the target's training examples under its base, with a cache beside the store."""
    task, base = target.task(), pool_base(store, target, request.base)
    device = resolve_device(request.device)
    loaded = load_base(base, task, device, resolve_dtype(request.dtype, device))
    sampling = Sampling("train", request.shots, request.examples, request.seed)
    return FeatureReader(loaded, base, task, sampling, store.sidecars / "features")


def _nearest(target: RankTarget, store: Store, names: list[str], request: RankRequest) -> list[str]:
    """Return the experts whose random projections are nearest to the target's."""
    with store_with_target(target, store, request) as where:
        return by_projection(where, target.name, names)[:SHORTLIST]
