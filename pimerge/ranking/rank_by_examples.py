"""``pimerge rank`` by the target's examples: every candidate is forwarded over them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pimerge.adapters.ranking_document import Ranking
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.libraries import quiet_libraries
from pimerge.core.progress import Track
from pimerge.embedding.features import STRENGTHS, FeatureReader, Sampling, why_not
from pimerge.embedding.store import Store, open_store
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.ranking.by_examples import gains_by_strength, rank_by_examples
from pimerge.ranking.calibration import measure_gains
from pimerge.ranking.measure import BY_EXAMPLES, BY_STORE, MEASURES, Measure
from pimerge.ranking.measures.combined import store_weight
from pimerge.ranking.nearest import SHORTLIST, by_projection, compare
from pimerge.ranking.own_expert import store_with_target
from pimerge.ranking.target import RankRequest, RankTarget, names_on, open_all, pool_base, pool_of

LEAST_WEIGHT = 0.01
"""Of the store's part in an expected gain: below that it is not worth the look."""


def by_default(asked: RankTarget, store: Store, request: RankRequest, folder: Path, track: Track) -> Ranking | str:
    """Rank by the default measure of the examples; or why the store has to decide.

    Args:
        folder: where the ranking will lie.

    Raises:
        PimergeError: if the examples cannot be used, and the target has no expert or they were asked for by --shots.
    """
    try:
        if reason := why_not(asked.task()):
            return reason
        reader = _viewer(asked, store, request)
        if asked.expert is not None and not reader.holds_out:
            return "one example of a class is too few to judge by"
        return _ranked(reader, asked, store, MEASURES.load(BY_EXAMPLES), request, folder, track)
    except PimergeError as error:
        if asked.expert is None or request.shots is not None:
            raise
        return f"the target's examples cannot be used ({error.problems[0].message})"


def by_examples(
    asked: RankTarget, store: Store, measure: Measure, request: RankRequest, folder: Path, track: Track
) -> Ranking:
    """Rank by a measure of the target's examples.

    Raises:
        PimergeError: if the target or its examples do not serve the measure.
    """
    return _ranked(_viewer(asked, store, request), asked, store, measure, request, folder, track)


def _ranked(
    reader: FeatureReader,
    asked: RankTarget,
    store: Store,
    measure: Measure,
    request: RankRequest,
    folder: Path,
    track: Track,
) -> Ranking:
    """Try the experts on the examples; of a large store, those whose sketches are nearest."""
    names, others = names_on(store, asked, reader.base)
    notes = []
    if len(names) > SHORTLIST:
        with suppress(PimergeError):  # there is nothing that they could be compared by: all of them are tried
            nearest = _nearest(asked, store, names, request, track)
            notes = [f"of {len(names)} experts, the {SHORTLIST} nearest by their sketches were tried on the examples"]
            names = nearest
    experts, broken = open_all(store, names)
    prior = _predicted_by_store(asked, store, reader)
    if prior:
        notes.append("its expert in the store saw more examples: how close the others are to it there counts too")
    with track("candidates", (1 + len(experts) * len(STRENGTHS)) * len(reader.labels), "examples") as advance:
        reader.advance = advance
        excluded, own = others | broken, asked.expert
        ranking = rank_by_examples(
            reader, experts, excluded, asked.named_from(folder), own, measure, request.rule, folder, prior
        )
    return ranking.with_notes(*notes)


def _predicted_by_store(asked: RankTarget, store: Store, reader: FeatureReader) -> dict[str, float]:
    """Name → gain at full strength that the store predicts; empty where it has nothing to add to the examples."""
    if not asked.stored:
        return {}
    classes = len(set(reader.labels.tolist()))
    weight = store_weight(len(reader.labels) / classes, store.experts[asked.name].examples / classes)
    if weight < LEAST_WEIGHT:
        return {}
    compared = compare(store, asked.name, MEASURES.load(BY_STORE))
    scores = [] if compared.similarity is None else compared.similarity.scores().tolist()
    return {name: weight * score for name, score in zip(compared.experts, scores, strict=True)}


def strengths_of(asked: RankTarget, store: Store, name: str, request: RankRequest) -> dict[float, dict[str, float]]:
    """Scale of a candidate → measure of the examples → what it gives above the bare base."""
    reader = _viewer(asked, store, request)
    return gains_by_strength(reader, store.open(name), _predicted_by_store(asked, store, reader).get(name, 0.0))


def _viewer(asked: RankTarget, store: Store, request: RankRequest) -> FeatureReader:
    """The target's training examples under its base; what is computed of them is kept beside the store."""
    quiet_libraries()
    task, base = asked.task(), pool_base(store, asked, request.base)
    device = resolve_device(request.device)
    loaded = load_base(base, task, device, resolve_dtype(request.dtype, device))
    draw = Sampling("train", request.shots, request.examples, request.seed)
    return FeatureReader(loaded, base, task, draw, store.sidecars / "features")


def calibrate_store(request: RankRequest, track: Track) -> dict[str, dict[str, dict[float, float]]]:
    """Measure the gain of every expert of the store for every other's task, and keep them in the store.

    A target whose task and sources are as they were measured is not measured again, but for ``--force``; one that
    cannot be measured is left out.

    Returns:
        target → source → scale → gain.

    Raises:
        PimergeError: if there is no target that can be measured.
    """
    store = open_store(request.store)
    done = {} if request.force else store.history()
    problems = Problems()
    for number, name in enumerate(store.experts, 1):
        with problems.collected(f"'{name}': "):
            request.note(f"[{number}/{len(store.experts)}] {name}")
            _calibrate(name, store, done.get(name, {}), request, track)
    if len(problems.found) >= len(store.experts):
        problems.raise_any("no expert's task can be measured")
    for problem in problems.found:
        request.warn(f"left out: {problem.message}")
    return store.history()


def _calibrate(
    name: str, store: Store, done: Mapping[str, Mapping[float, float]], request: RankRequest, track: Track
) -> None:
    """Measure the gains for one target, unless they are known."""
    asked = RankTarget(name, store.open(name), store.folder_of(name), stored=True)
    if asked.task().sha256() != store.experts[name].task_sha256:
        raise PimergeError("its task has changed since it was embedded", "run 'pimerge embed' again")
    experts, _ = pool_of(store, asked, pool_base(store, asked, request.base))
    if not experts:
        raise PimergeError("no other expert of the store has its base", "embed the whole pool into one store")
    if done.keys() == experts.keys():
        return
    reader = _viewer(asked, store, request)
    with track("candidates", (1 + len(experts) * len(STRENGTHS)) * len(reader.labels), "examples") as advance:
        reader.advance = advance
        store.add_gains(name, measure_gains(reader, experts))


def _nearest(asked: RankTarget, store: Store, names: list[str], request: RankRequest, track: Track) -> list[str]:
    """The experts whose sketches are nearest to the target's."""
    if asked.stored:
        return by_projection(store, asked.name, names)[:SHORTLIST]
    with store_with_target(asked, store, request, track) as where:
        return by_projection(where, asked.name, names)[:SHORTLIST]
