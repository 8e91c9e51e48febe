"""A target of the store against the store's other experts: which of them compare, and how close they are.

Up to :data:`SHORTLIST` experts are compared one by one. Of a larger store the random projections choose the nearest
100, which are then compared exactly; the pool's mean is that of a systematic sample, from the nearest to the farthest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pimerge.adapters.compatibility import differing_form, init_cosine
from pimerge.adapters.expert import Expert
from pimerge.adapters.kind import KINDS
from pimerge.core.errors import PimergeError
from pimerge.embedding.random_projection import from_texts
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import Embedding
from pimerge.embedding.store_view import StoreView
from pimerge.ranking.cosine import Similarity
from pimerge.ranking.measure import Measure, Needs

SHORTLIST = 100
MEAN_OF = 16


@dataclass(frozen=True)
class StoreComparison:
    """The target against the experts that compare with it.

    Attributes:
        experts: name → expert, those that were compared.
        similarity: of the target with each of them, in their order; None if there is none.
        excluded: name → why it cannot be compared.
        shortlisted_from: how many experts the random projections chose from; None if all were compared.
    """

    experts: dict[str, Expert]
    similarity: Similarity | None
    excluded: dict[str, str]
    shortlisted_from: int | None


def compare(store: Store, target: str, measure: Measure) -> StoreComparison:
    """Compare a target with the other experts of its store.

    Args:
        target: a name in the store.
        measure: one of ``measures/`` that needs the store alone.
    """
    opened = store.open(target)
    if measure.needs_update and not opened.modules:
        raise PimergeError(
            f"the measure compares updates ΔW, and '{target}' is of kind {opened.kind}, which has none",
            "use --measure fisher, marginals or fisher-raw",
        )
    own = _view(store, target, opened, measure)
    names, others = _alike(store, target, measure)
    sampled: list[str] = []
    if len(names) > SHORTLIST:
        ordered = by_projection(store, target, names)
        names, sampled = ordered[:SHORTLIST], _spread(ordered)
    found, unlike = _comparable(store, target, own, names, measure)
    excluded = dict(sorted({**others, **unlike}.items()))
    experts = {name: member.expert for name, member in found.items()}
    shortlisted_from = len(ordered) if sampled else None
    if not found:
        return StoreComparison({}, None, excluded, shortlisted_from)
    extra, _ = _comparable(store, target, own, sorted(set(sampled) - found.keys()), measure)
    members = {target: own, **found, **extra}
    pool = [place for place, name in enumerate(members) if name in sampled or not sampled]
    similarity = measure.similarity(list(members.values()), len(found), pool, bool(sampled))
    if not np.isfinite(similarity.scores()).all():
        raise PimergeError(
            f"the scores of the target '{target}' are not finite", "embed the pool again: pimerge embed --force"
        )
    return StoreComparison(experts, similarity, excluded, shortlisted_from)


def _comparable(
    store: Store, target: str, own: StoreView, names: Sequence[str], measure: Measure
) -> tuple[dict[str, StoreView], dict[str, str]]:
    """The experts of some names that compare with the target, and why the others do not."""

    def opened(name: str) -> StoreView | str:
        try:
            expert = store.open(name)
            reason = _difference(store, target, own.expert, name, expert, measure)
            return reason or _view(store, name, expert, measure)
        except PimergeError as error:
            return error.problems[0].message

    # on every core: what takes long is to hash the files, which releases the interpreter's lock
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = dict(zip(names, threads.map(opened, names), strict=True))
    members = {name: each for name, each in found.items() if isinstance(each, StoreView)}
    return members, {name: each for name, each in found.items() if isinstance(each, str)}


def _view(store: Store, name: str, expert: Expert, measure: Measure) -> StoreView:
    """An expert of the store with what a measure reads."""
    needs = measure.needs
    return store.view(name, expert, diagonal=needs is Needs.FISHER, moments=needs is Needs.SECOND_MOMENTS)


def by_projection(store: Store, target: str, others: Sequence[str]) -> list[str]:
    """Names of the store in descending order of the similarity of their random projections to the target's, centred.

    :mod:`pimerge.embedding.random_projection` states the error of an inner product of projections: one of the truly
    nearest experts that stands out by more than that is among the first.
    """
    entries = [store.document.experts[name] for name in (target, *others)]
    scores = np.zeros(len(others), np.float32)
    for part in entries[0].sketches:
        projections = from_texts([entry.sketches[part] for entry in entries])
        centred = projections - projections.mean(0)
        norms = np.linalg.norm(centred, axis=1)
        scale = norms[1:] * norms[0]
        scores += centred[1:] @ centred[0] / np.where(scale > 0, scale, np.inf)
    return [others[index] for index in np.argsort(-scores, kind="stable")]


def _alike(store: Store, target: str, measure: Measure) -> tuple[list[str], dict[str, str]]:
    """The experts that the measure can compare with the target, and the reason for each of the others.

    They have the target's base and its kind, unless the measure looks at the layers' second moments or at ΔW alone.
    """
    entries = store.document.experts
    own, alike, others = entries[target], [], {}
    for name, entry in entries.items():
        if entry.base != own.base:
            bases = [store.base_name(each) for each in (name, target)]
            others[name] = f"its base is {bases[0]}, another model than the target's {bases[1]}"
        elif entry.kind != own.kind and not _compare_across_kinds(measure, entry, own):
            others[name] = (
                f"its kind is {entry.kind}, the target's {own.kind}; '--measure marginals' compares experts of any kind"
            )
        elif name != target:
            alike.append(name)
    return alike, others


def _compare_across_kinds(measure: Measure, entry: Embedding, own: Embedding) -> bool:
    """Whether a measure compares two experts of different kinds."""
    return measure.any_kind and (not measure.needs_update or (_has_update(entry) and _has_update(own)))


def _has_update(entry: Embedding) -> bool:
    """Whether an expert is of a kind that is known and has a ΔW."""
    return entry.kind in KINDS.names() and KINDS.load(entry.kind).has_update


def _spread(ordered: Sequence[str]) -> list[str]:
    """A systematic sample of the experts from the nearest to the farthest, for the mean."""
    return [ordered[round(len(ordered) * (place + 0.5) / MEAN_OF - 0.5)] for place in range(MEAN_OF)]


def _difference(store: Store, target: str, own: Expert, name: str, expert: Expert, measure: Measure) -> str:
    """Why an expert cannot be compared with the target; empty if it can be."""
    shapes = {n: (m.d_out, m.d_in) for n, m in own.modules.items()}
    if any(shapes.get(n, (m.d_out, m.d_in)) != (m.d_out, m.d_in) for n, m in expert.modules.items()):
        return "its modules have other shapes than the target's"
    if measure.same_basis and (reason := differing_form(own, expert)):
        return reason
    if measure.same_basis:
        cosine, least = init_cosine(own, expert)
        if cosine < least:
            return (
                f"its init differs from the target's (cosine of the factors A {cosine:.2f}, "
                f"a shared init has at least {least:.2f}); '--measure delta' does not depend on it"
            )
    labels = [store.document.experts[each].settings.labels for each in (name, target)]
    if measure.needs in (Needs.FISHER, Needs.SECOND_MOMENTS) and labels[0] != labels[1]:
        return f"its Fisher has {labels[0]} labels, the target's {labels[1]}"
    return ""
