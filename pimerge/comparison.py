"""A target of the store against the store's other experts: which of them compare, and how close they are.

Up to :data:`SHORTLIST` experts are compared one by one. Of a larger store the sketches choose the nearest so many,
which are then compared exactly; the pool's mean is that of a seeded sample.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from pimerge.compatibility import differing_form, init_cosine
from pimerge.errors import PimergeError
from pimerge.expert import Expert
from pimerge.similarity import Similarity
from pimerge.sketch import from_texts
from pimerge.store import Store

SHORTLIST = 100
MEAN_OF = 64


@dataclass(frozen=True)
class Compared:
    """The target against the experts that compare with it.

    Attributes:
        experts: name → expert, those that were compared.
        similarity: of the target with each of them, in their order; None if there is none.
        excluded: name → why it cannot be compared.
        shortlisted_from: how many experts the sketches chose from; None if all were compared.
    """

    experts: dict[str, Expert]
    similarity: Similarity | None
    excluded: dict[str, str]
    shortlisted_from: int | None


def compare(store: Store, target: str, measure: ModuleType) -> Compared:
    """Compare a target with the other experts of its store.

    Args:
        target: a name in the store.
        measure: one of ``measures/`` that needs the store alone.

    Raises:
        PimergeError: if the target itself has changed, or a score is not finite.
    """
    own = store.open(target)
    others = [name for name in store.experts if name != target]
    names, sampled = others, list[str]()
    if len(others) > SHORTLIST:
        others = _alike(store, target, others)
        names, sampled = nearest_by_sketch(store, target, others, SHORTLIST), _sample(others)
    experts, excluded = comparable(store, target, own, names, measure)
    shortlisted_from = len(others) if sampled else None
    if not experts:
        return Compared({}, None, excluded, shortlisted_from)
    extra, _ = comparable(store, target, own, sorted(set(sampled) - experts.keys()), measure)
    opened = {target: own, **experts, **extra}
    with _threads() as threads:
        members = list(threads.map(lambda name: store.member(name, opened[name], measure.NEEDS), opened))
    place = {name: index for index, name in enumerate(opened)}
    pool = [place[name] for name in sampled if name in place] or list(range(len(members)))
    similarity: Similarity = measure.similarity(members, len(experts), pool)
    if not similarity.scores().isfinite().all():
        raise PimergeError(
            f"the scores of the target '{target}' are not finite", "embed the pool again: pimerge embed --force"
        )
    return Compared(experts, similarity, excluded, shortlisted_from)


def comparable(
    store: Store, target: str, own: Expert, names: Sequence[str], measure: ModuleType
) -> tuple[dict[str, Expert], dict[str, str]]:
    """The experts of some names that compare with the target, and why the others do not."""

    def opened(name: str) -> Expert | str:
        try:
            expert = store.open(name)
            return _difference(store, target, own, name, expert, measure) or expert
        except PimergeError as error:
            return error.problems[0].message

    with _threads() as threads:
        found = dict(zip(names, threads.map(opened, names), strict=True))
    experts = {name: each for name, each in found.items() if isinstance(each, Expert)}
    return experts, {name: each for name, each in found.items() if isinstance(each, str)}


def nearest_by_sketch(store: Store, target: str, others: Sequence[str], count: int) -> list[str]:
    """The names of the ``count`` experts whose sketches are nearest to the target's around the mean sketch.

    The error of an inner product of sketches is stated in :mod:`pimerge.sketch`: an expert of the true first few
    that stands out by more than that is on the list.
    """
    entries = [store.document.experts[name] for name in (target, *others)]
    scores = np.zeros(len(others), np.float32)
    for part in entries[0].sketches:
        sketches = from_texts([entry.sketches[part] for entry in entries])
        centred = sketches - sketches.mean(0)
        norms = np.linalg.norm(centred, axis=1)
        scale = norms[1:] * norms[0]
        scores += centred[1:] @ centred[0] / np.where(scale > 0, scale, np.inf)
    return [others[index] for index in np.argsort(-scores, kind="stable")[:count]]


def _threads() -> ThreadPoolExecutor:
    """To open files on every core: what takes long is to hash them, which releases the interpreter's lock."""
    return ThreadPoolExecutor(os.cpu_count())


def _alike(store: Store, target: str, names: Sequence[str]) -> list[str]:
    """Those of the target's base and kind, by the document alone."""
    entries = store.document.experts
    own = entries[target]
    return [name for name in names if (entries[name].base, entries[name].kind) == (own.base, own.kind)]


def _sample(names: Sequence[str]) -> list[str]:
    """Of the pool, for its mean: the error of that, mostly the same for every candidate, moves few places."""
    return sorted(random.Random(0).sample(list(names), min(MEAN_OF, len(names))))


def _difference(store: Store, target: str, own: Expert, name: str, expert: Expert, measure: ModuleType) -> str:
    """Why an expert cannot be compared with the target; empty if it can be."""
    first, second = store.document.experts[target], store.document.experts[name]
    if first.base != second.base:
        named = [each.config.get("base_model_name_or_path") for each in (expert, own)]
        return f"its base is {named[0]}, another model than the target's {named[1]}"
    if first.kind != second.kind:
        return f"its kind is {second.kind}, the target's {first.kind}"
    shapes = {n: (m.d_out, m.d_in) for n, m in own.modules.items()}
    if any(shapes.get(n, (m.d_out, m.d_in)) != (m.d_out, m.d_in) for n, m in expert.modules.items()):
        return "its modules have other shapes than the target's"
    if measure.SAME_BASIS and (reason := differing_form(own, expert)):
        return reason
    if measure.SAME_BASIS:
        cosine, least = init_cosine(own, expert)
        if cosine < least:
            return (
                f"its init differs from the target's (cosine of the factors A {cosine:.2f}, "
                f"a shared init has at least {least:.2f}); '--measure delta' does not depend on it"
            )
    if measure.NEEDS in ("fisher", "marginals") and first.settings.labels != second.settings.labels:
        return f"its Fisher has {second.settings.labels} labels, the target's {first.settings.labels}"
    return ""
