"""What ``pimerge rank`` does with a target: find it, choose the measure, rank; and say why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pimerge.adapters.ranking_document import Ranking
from pimerge.core.errors import PimergeError
from pimerge.core.progress import Track
from pimerge.embedding.store import Store, open_store
from pimerge.ranking.by_store import rank_by_history, rank_by_store
from pimerge.ranking.measure import BY_STORE, MEASURES, Needs
from pimerge.ranking.nearest import compare
from pimerge.ranking.target import AUTO, RankRequest, RankTarget, find_target, folder_for, pool_base, pool_of


@dataclass(frozen=True)
class RankingContext:
    """A ranking, and what it came from.

    Attributes:
        store: the store that was asked; ``compared_in`` the one that has the target, if there is one.
    """

    ranking: Ranking
    asked: RankTarget
    store: Store
    compared_in: Store | None
    request: RankRequest


@contextmanager
def ranked(target: str, request: RankRequest, folder: Path, track: Track) -> Iterator[RankingContext]:
    """Rank the experts of the store for a target.

    Without a measure given, a target with an expert is ranked by the store where its examples cannot be used, but not
    where ``--shots`` asks for them; and a target whose expert ``--train-target`` has trained, since that is its use.

    Args:
        folder: where the ranking will lie.

    Raises:
        PimergeError: if the target or its examples do not serve the measure that was asked for.
    """
    if request.measure != AUTO:
        MEASURES.load(request.measure)
    store = open_store(request.store)
    asked = find_target(target, store, request.base)
    if asked.expert is None and request.train_target:
        from pimerge.ranking.own_expert import trained

        asked = trained(asked, store, request, track)
    if request.train_target and request.measure == AUTO and asked.folder == folder_for(store, asked.name):
        request = replace(request, measure=BY_STORE)
    found = _without_comparing(asked, store, request, folder, track)
    if isinstance(found, Ranking):
        yield RankingContext(found, asked, store, store if asked.stored else None, request)
        return
    measure = BY_STORE if request.measure == AUTO else request.measure
    with _target_in_store(asked, store, request, track) as where:
        ranking = rank_by_store(where, asked.name, MEASURES.load(measure), request.rule, folder)
        notes = [f"{found}: ranked by '{measure}' from the store"] if found else []
        if asked.expert is None:
            head = ", with a head of its examples" if asked.task().type.trains_head else ""
            kind = where.experts[asked.name].kind
            notes.append(f"the target has no expert: its Fisher is that at the pool's init of the kind {kind}{head}")
        ranking = ranking.model_copy(update={"target": asked.named_from(folder)}).with_notes(*notes)
        yield RankingContext(ranking, asked, store, where, request)


@dataclass(frozen=True)
class Explanation:
    """Why a candidate has its place.

    Attributes:
        scales: scale → measure of the examples → what it gives above the bare base; empty without examples.
        by: the measure of the store whose parts follow.
        tensors: tensor → what it adds to the score by that measure; empty if that does not compare the two.
    """

    scales: dict[float, dict[str, float]]
    by: str
    tensors: dict[str, float]

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"by_scale": self.scales, "measure": self.by, "by_tensor": self.tensors}


def explain(found: RankingContext, name: str) -> Explanation:
    """What makes a candidate's score: by scale on the examples, and by tensor in the store."""
    measure = found.ranking.measure
    by = measure if MEASURES.load(measure).compares_embeddings else BY_STORE
    tensors: dict[str, float] = {}
    if found.compared_in is not None:
        compared = compare(found.compared_in, found.asked.name, MEASURES.load(by))
        if compared.similarity is not None and name in compared.experts:
            added = compared.similarity.contributions()[list(compared.experts).index(name)].tolist()
            tensors = dict(zip(compared.similarity.tensors, added, strict=True))
    if found.ranking.seen is None:
        return Explanation({}, by, tensors)
    from pimerge.ranking.rank_by_examples import strengths_of

    return Explanation(strengths_of(found.asked, found.store, name, found.request), by, tensors)


def _without_comparing(
    asked: RankTarget, store: Store, request: RankRequest, folder: Path, track: Track
) -> Ranking | str:
    """The ranking, unless the target's expert has to be compared with the others; then why, if it was not asked for."""
    if request.measure == AUTO:
        from pimerge.ranking.rank_by_examples import by_default

        return by_default(asked, store, request, folder, track)
    measure = MEASURES.load(request.measure)
    if measure.needs is Needs.EXAMPLES:
        from pimerge.ranking.rank_by_examples import by_examples

        return by_examples(asked, store, measure, request, folder, track)
    if measure.needs is Needs.HISTORY:
        experts, excluded = pool_of(store, asked, pool_base(store, asked, request.base))
        return rank_by_history(store, experts, excluded, asked.named_from(folder), measure, request.rule, folder)
    if measure.needs is Needs.EXPERTS and asked.expert is None:
        raise PimergeError(
            f"the target '{asked.name}' has no expert, and '{request.measure}' compares experts",
            "pass --train-target to train one, or a measure of its examples (--measure combined)",
        )
    return ""


@contextmanager
def _target_in_store(asked: RankTarget, store: Store, request: RankRequest, track: Track) -> Iterator[Store]:
    """A store that has the target."""
    if asked.stored:
        yield store
        return
    from pimerge.ranking.own_expert import store_with_target

    with store_with_target(asked, store, request, track) as where:
        yield where
