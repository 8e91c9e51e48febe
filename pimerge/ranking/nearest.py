"""Compare an expert of a store with the store's other experts.

Up to :data:`SHORTLIST` experts are compared exactly. In a larger store, random projections choose that many nearest
experts, and the pool's mean is taken over a systematic sample from the nearest to the farthest.
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
    """Comparison of a target with the experts of its store.

    Attributes:
        experts: name → expert, for the experts that were compared.
        similarity: similarity of the target to these experts, in their order; None if there are none.
        excluded: name → why the expert cannot be compared.
        shortlisted_from: number of experts from which random projections chose; None if all were compared.
    """

    experts: dict[str, Expert]
    similarity: Similarity | None
    excluded: dict[str, str]
    shortlisted_from: int | None


def compare(store: Store, target: str, measure: Measure) -> StoreComparison:
    """Compare a target with the other experts of its store.

    Args:
        target: the name of an expert in the store.
        measure: a measure of the store.
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
    """Open the experts that can be compared with the target, and say why the others cannot."""

    def opened(name: str) -> StoreView | str:
        try:
            expert = store.open(name)
            reason = _difference(store, target, own.expert, name, expert, measure)
            return reason or _view(store, name, expert, measure)
        except PimergeError as error:
            error.raise_if_disk_fails()
            return error.problems[0].message

    # on every core: hashing the files takes most of the time and releases the GIL
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = dict(zip(names, threads.map(opened, names), strict=True))
    members = {name: each for name, each in found.items() if isinstance(each, StoreView)}
    return members, {name: each for name, each in found.items() if isinstance(each, str)}


def _view(store: Store, name: str, expert: Expert, measure: Measure) -> StoreView:
    """Return the store view of an expert with the tensors that a measure reads."""
    needs = measure.needs
    return store.view(name, expert, diagonal=needs is Needs.FISHER, moments=needs is Needs.SECOND_MOMENTS)


def by_projection(store: Store, target: str, others: Sequence[str]) -> list[str]:
    """Sort names of the store by the similarity of their random projections to the target's, around the mean.

    An expert that is truly among the nearest comes first if it stands out by more than the error of the projections,
    which :mod:`pimerge.embedding.random_projection` states.
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
    """Return the names that can be compared with the target according to the document, and why the others cannot.

    They have the target's base, and its kind unless the measure compares experts of any kind.
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
    """Whether an expert is of a known kind with ΔW."""
    return entry.kind in KINDS.names() and KINDS.load(entry.kind).has_update


def _spread(ordered: Sequence[str]) -> list[str]:
    """Return experts at equal distances from the nearest to the farthest, whose mean is like the pool's."""
    return [ordered[round(len(ordered) * (place + 0.5) / MEAN_OF - 0.5)] for place in range(MEAN_OF)]


def _difference(store: Store, target: str, own: Expert, name: str, expert: Expert, measure: Measure) -> str:
    """Say why an expert cannot be compared with the target; empty if it can."""
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
