"""``pimerge.rank``: rank the experts of a store for a target, and explain the rank of a candidate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Candidate, Ranking
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, nearest
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.embedding.store import Store, open_store
from pimerge.ranking.by_store import rank_by_history, rank_by_store
from pimerge.ranking.measure import BY_STORE, MEASURES, Needs
from pimerge.ranking.nearest import compare
from pimerge.ranking.own_expert import store_with_target, trained
from pimerge.ranking.state_dicts import ranked_state_dicts
from pimerge.ranking.target import AUTO, RankRequest, RankTarget, find_target, folder_for, pool_base, pool_of
from pimerge.ranking.target_examples import by_default, by_examples, gains_of
from pimerge.tasks.task import TaskSource


@checked_arguments(examples=2, shots=1, k=1)
def rank(
    target: Expert | TaskSource,
    *,
    store: str | Path = "embeddings.json",
    k: int | None = 2,
    measure: str = AUTO,
    shots: int | None = None,
    up_to_shots: bool = False,
    examples: int = 500,
    seed: int = 0,
    gate: bool = True,
    train_target: bool = False,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
    warn: Note = unheard,
) -> Ranking:
    """Rank the experts of a store by how much they are expected to help a target, and select the first k.

    If the target's examples can be read, every expert is tried on them at four strengths. Otherwise the experts'
    embeddings in the store are compared. The default measure also compares embeddings if the target has its own expert
    and its examples cannot be used, unless ``shots`` is given, and if ``train_target`` trained the target's expert.

    Args:
        target: an expert's name in the store, its folder, or the folder of a task; an open expert or task; or rows in
            memory (a ``datasets.Dataset`` or a list of dicts). For a ``.safetensors`` file without a config, the other
            files of its folder are ranked, without a store.
        store: the ``embeddings.json`` that ``embed`` wrote.
        k: number of experts to select; None chooses it by the gains of their means or the gaps between scores.
        measure: ``auto`` is ``combined`` if the target's examples can be read, otherwise ``fisher``; ``pimerge rank
            --measures`` lists all measures.
        shots: training examples per class of the target; None uses all.
        up_to_shots: take all examples of a class that has fewer than ``shots``, instead of refusing.
        examples: maximum number of the target's examples.
        seed: seed of the sampling.
        gate: select only experts that are expected to help.
        train_target: train an expert for a target without one, and rank by the store.
        base: the base model, a folder or Hub id, instead of the target's own.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ….
        dtype: ``float32``, ``bfloat16``, ``float64`` or ``auto`` (bfloat16 on a GPU, otherwise float32).
        force: replace an expert that ``train_target`` trained before.
        track: shows progress.
        note: receives remarks, one sentence at a time.
        warn: receives warnings, one sentence at a time.

    Returns:
        the candidates in descending order of their scores, with strengths, expected gains and intervals. ``selected``
        holds the names of the selected experts and is empty if no expert is expected to help. ``save(path)`` writes
        ``ranking.json``.

    Example:
        In a folder with an ``embeddings.json``::

            ranking = pimerge.rank([{"text": "oh no", "label": "bad"}, …], k=3)
            ranking.save("ranking.json")
    """
    request = RankRequest(
        store=store,
        k=k,
        measure=measure,
        shots=shots,
        up_to_shots=up_to_shots,
        examples=examples,
        seed=seed,
        gate=gate,
        train_target=train_target,
        base=base,
        device=device,
        dtype=dtype,
        force=force,
        track=track,
        note=note,
        warn=warn,
    )
    states = ranked_state_dicts(str(target), request) if isinstance(target, str | Path) else None
    if states is not None:
        return states
    with _ranked(target, request) as found:
        return found.ranking.with_task(found.target.given)


@dataclass(frozen=True)
class Explanation:
    """Explanation of a candidate's rank.

    Attributes:
        candidate: the candidate of the ranking.
        strengths: strength → measure of examples → its value minus that of the bare base; empty without examples.
        measure: the measure of the store for ``tensors``.
        tensors: tensor → its contribution to the score by that measure; empty if the two cannot be compared.
    """

    candidate: Candidate
    strengths: dict[float, dict[str, float]]
    measure: str
    tensors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that ``pimerge rank --explain NAME --json`` prints."""
        return {
            "candidate": self.candidate.model_dump(),
            "by_scale": self.strengths,
            "measure": self.measure,
            "by_tensor": self.tensors,
        }


def explain(target: Expert | TaskSource, name: str, request: RankRequest) -> Explanation:
    """Explain the rank of a candidate, by strength on the examples and by tensor in the store."""
    with _ranked(target, request) as found:
        candidate = _candidate(found.ranking, name)
        own = found.ranking.measure
        by = own if MEASURES.load(own).compares_embeddings else BY_STORE
        tensors: dict[str, float] = {}
        if found.compared_in is not None:
            compared = compare(found.compared_in, found.target.name, MEASURES.load(by))
            if compared.similarity is not None and name in compared.experts:
                added = compared.similarity.contributions()[list(compared.experts).index(name)].tolist()
                tensors = dict(zip(compared.similarity.tensors, added, strict=True))
        seen = found.ranking.seen is not None
        strengths = gains_of(found.target, found.store, name, request) if seen else {}
        return Explanation(candidate, strengths, by, tensors)


def _candidate(ranking: Ranking, name: str) -> Candidate:
    """Return a candidate of a ranking by its name."""
    for candidate in ranking.candidates:
        if candidate.name == name:
            return candidate
    for other in ranking.not_comparable:
        if other.name == name:
            raise PimergeError(f"'{name}' cannot be compared with '{ranking.target.name}': {other.reason}")
    raise PimergeError(
        f"there is no candidate '{name}' for '{ranking.target.name}'",
        nearest(name, [each.name for each in ranking.candidates]),
    )


@dataclass(frozen=True)
class _RankingContext:
    """A ranking, its target and its store; ``compared_in`` is a store that holds the target, if there is one."""

    ranking: Ranking
    target: RankTarget
    store: Store
    compared_in: Store | None


@contextmanager
def _ranked(source: Expert | TaskSource, request: RankRequest) -> Iterator[_RankingContext]:
    """Rank the experts of the store; a temporary store with the target may exist during the block."""
    if request.measure != AUTO:
        MEASURES.load(request.measure)
    store = open_store(Path(request.store))
    target = replace(find_target(source, store, request.base), up_to_shots=request.up_to_shots)
    if target.expert is None and request.train_target:
        target = trained(target, store, request)
    if request.train_target and request.measure == AUTO and target.folder == folder_for(store, target.name):
        request = replace(request, measure=BY_STORE)
    found = _without_comparing(target, store, request)
    if isinstance(found, Ranking):
        yield _RankingContext(found, target, store, store if target.stored else None)
        return
    measure = MEASURES.load(BY_STORE if request.measure == AUTO else request.measure)
    with store_with_target(target, store, request) as where:
        ranking = rank_by_store(where, target.name, measure, request.rule)
        notes = [f"{found}: ranked by '{measure.name}' from the store"] if found else []
        if target.expert is None:
            head = ", with a head fitted to its examples" if target.task().type.trains_head else ""
            kind = where.experts[target.name].kind
            notes.append(f"the target has no expert: its Fisher is taken at the pool's init of the kind {kind}{head}")
        ranking = ranking.model_copy(update={"target": target.reference()}).with_notes(*notes)
        yield _RankingContext(ranking, target, store, where)


def _without_comparing(target: RankTarget, store: Store, request: RankRequest) -> Ranking | str:
    """Rank without comparing embeddings, or say why embeddings are compared (empty if the measure says so)."""
    if request.measure == AUTO:
        return by_default(target, store, request)
    measure = MEASURES.load(request.measure)
    if measure.needs is Needs.EXAMPLES:
        return by_examples(target, store, measure, request)
    if measure.needs is Needs.HISTORY:
        experts, excluded = pool_of(store, target, pool_base(store, target, request.base))
        return rank_by_history(store, experts, excluded, target.reference(), measure, request.rule)
    if measure.needs is Needs.EXPERTS and target.expert is None:
        raise PimergeError(
            f"the target '{target.name}' has no expert, and '{measure.name}' compares experts",
            "pass --train-target to train one, or a measure of its examples (--measure combined)",
        )
    return ""
