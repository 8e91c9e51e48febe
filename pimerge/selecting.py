"""A target and a pool → the ranking: by the target's examples where they can be read, else by the store alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pimerge import few_shot, strategies
from pimerge.comparison import Compared, compare
from pimerge.errors import PimergeError
from pimerge.expert import Expert
from pimerge.features import Viewer
from pimerge.few_shot import Z95, Judged, judge
from pimerge.files import relative_to
from pimerge.measures.history import predicted
from pimerge.ranking import Candidate, NotComparable, Ranking, Seen, Target
from pimerge.store import Store

BY_EXAMPLES, BY_STORE = "combined", "fisher"
MOST = 8


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        k: how many experts to select; None to choose the number.
        gate: whether only experts are selected that are expected to help.
    """

    k: int | None = 2
    gate: bool = True


def rank_by_store(store: Store, target: str, measure: str, wish: Wish, folder: Path) -> Ranking:
    """Rank the experts of a store by how close they are to one of them.

    Args:
        target: a name in the store.
        measure: one that needs the store alone.
        folder: where the ranking will lie; its paths are relative to that.

    Raises:
        PimergeError: if the target itself has changed.
    """
    strategy = strategies.load("measures", measure)
    compared = compare(store, target, strategy)
    scores, errors = _scores(compared)
    candidates = [
        Candidate(
            name=name,
            path=relative_to(expert.path, folder),
            sha256=expert.sha256,
            score=score,
            low=max(-1.0, score - Z95 * error),
            high=min(1.0, score + Z95 * error),
            helps=score > strategy.GATE,
        )
        for (name, expert), score, error in zip(compared.experts.items(), scores, errors, strict=True)
    ]
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.name))
    helpful = [candidate for candidate in candidates if candidate.helps or not wish.gate]
    count = wish.k if wish.k is not None else widest_gap([candidate.score for candidate in helpful])
    notes = []
    if compared.shortlisted_from is not None:
        notes.append(
            f"the {len(candidates) + len(compared.excluded)} nearest of {compared.shortlisted_from} by their sketches "
            "were compared exactly"
        )
    own = store.open(target)
    return _ranking(
        Target(name=target, path=relative_to(own.path, folder), sha256=own.sha256),
        measure,
        count,
        candidates,
        compared.excluded,
        helpful[:count],
        f"of {len(candidates)} comparable experts by '{measure}': {strategies.summaries('measures')[measure]}",
        notes,
    )


def rank_by_examples(
    viewer: Viewer,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    own: Expert | None,
    measure: str,
    wish: Wish,
    folder: Path,
) -> Ranking:
    """Rank experts by what they make of the target's examples.

    Args:
        experts: name → expert of the target's base.
        excluded: name → why it is none of them.
        own: the target's own expert, if it has one.
        measure: one that needs examples.

    Raises:
        PimergeError: if the measure cannot be had from these examples.
    """
    strategy = strategies.load("measures", measure)
    verdict = judge(viewer, experts, strategy, own)
    candidates = [_judged(name, experts[name], found, folder) for name, found in verdict.judged.items()]
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.name))
    helpful = [candidate for candidate in candidates if candidate.helps or not wish.gate]
    notes = viewer.notes()
    if own is None:
        notes.insert(0, "the target has no expert: its examples alone decide")
    if wish.k is None:
        scaled = [experts[candidate.name].scaled(candidate.scale) for candidate in helpful[:MOST]]
        gains = few_shot.gains_of_means(viewer, scaled)
        count = 1 + max(range(len(gains)), key=lambda i: gains[i]) if gains else 0
        notes += [
            f"expected gain of the mean of the first {i}: {100 * gain:+.1f} points" for i, gain in enumerate(gains, 1)
        ]
    else:
        count = wish.k
    return _ranking(
        target,
        measure,
        count,
        candidates,
        {**excluded, **verdict.excluded},
        helpful[:count],
        f"of {len(candidates)} experts by '{measure}' on {len(viewer.labels)} examples: "
        + strategies.summaries("measures")[measure],
        notes,
        verdict.base_score,
        viewer.seen(),
    )


def rank_by_history(
    store: Store,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    wish: Wish,
    folder: Path,
) -> Ranking:
    """Rank experts by the gains that they had for the other targets of the store.

    Args:
        experts: name → expert of the target's base.
        excluded: name → why it is none of them.

    Raises:
        PimergeError: if the store has no such gains.
    """
    history = {name: gains for name, gains in store.history().items() if name != target.name}
    if not history:
        raise PimergeError(
            f"the store '{store.path}' has no gains of its experts for each other, or they are out of date",
            "run 'pimerge rank --calibrate' first",
        )
    similarities: dict[str, float] = {}
    if target.expert and target.name in store.experts:
        compared = compare(store, target.name, strategies.load("measures", BY_STORE))
        similarities = dict(zip(compared.experts, _scores(compared)[0], strict=True))
    candidates, unknown = [], dict(excluded)
    for name, expert in experts.items():
        found = predicted(history, similarities, name)
        if found is None:
            unknown[name] = "it was not there when 'pimerge rank --calibrate' ran"
            continue
        scale, gain, error = found
        error = min(error, 1.0)
        candidates.append(_judged(name, expert, Judged(scale, gain, error, gain, error), folder))
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.name))
    helpful = [candidate for candidate in candidates if candidate.helps or not wish.gate]
    count = wish.k if wish.k is not None else widest_gap([candidate.score for candidate in helpful])
    weighted = "weighted by their similarity to it" if similarities else "weighted alike, since it is not in the store"
    return _ranking(
        target,
        "history",
        count,
        candidates,
        unknown,
        helpful[:count],
        f"of {len(candidates)} experts by 'history': {strategies.summaries('measures')['history']}",
        [f"from the gains for {len(history)} other targets, {weighted}"],
        0.0,
    )


def widest_gap(scores: Sequence[float], most: int = MOST) -> int:
    """How many stand before the widest gap in descending scores, among the first ``most``.

    >>> widest_gap([0.9, 0.8, 0.3, 0.2]), widest_gap([0.5]), widest_gap([])
    (2, 1, 0)
    """
    gaps = [first - second for first, second in itertools.pairwise(scores[: most + 1])]
    return 1 + max(range(len(gaps)), key=lambda i: gaps[i]) if gaps else len(scores)


def _scores(compared: Compared) -> tuple[list[float], list[float]]:
    if compared.similarity is None:
        return [], []
    return compared.similarity.scores().tolist(), compared.similarity.errors().tolist()


def _judged(name: str, expert: Expert, found: Judged, folder: Path) -> Candidate:
    return Candidate(
        name=name,
        path=relative_to(expert.path, folder),
        sha256=expert.sha256,
        score=found.score,
        low=found.score - Z95 * found.error,
        high=found.score + Z95 * found.error,
        scale=found.scale,
        gain=found.gain,
        gain_low=found.gain - Z95 * found.gain_error,
        gain_high=found.gain + Z95 * found.gain_error,
        helps=found.helps,
    )


def _ranking(
    target: Target,
    measure: str,
    k: int,
    candidates: list[Candidate],
    excluded: Mapping[str, str],
    selected: Sequence[Candidate],
    what: str,
    notes: list[str],
    base_score: float | None = None,
    seen: Seen | None = None,
) -> Ranking:
    """The document, with the sentence on why these experts are selected."""
    if selected:
        why = f"the {len(selected)} best {what}"
    elif candidates:
        why = f"no expert is expected to help, {what}"
    else:
        why = f"no expert of the store can be compared with {target.name}"
    return Ranking(
        target=target,
        measure=measure,
        k=k,
        selected=[candidate.name for candidate in selected],
        why=why,
        notes=notes,
        base_score=base_score,
        seen=seen,
        candidates=candidates,
        not_comparable=[NotComparable(name=name, reason=reason) for name, reason in excluded.items()],
    )
