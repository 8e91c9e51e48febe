"""Measure the gain of every expert of a pool for every other expert's task, and keep the gains in the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.core.errors import PimergeError, Problems
from pimerge.embedding.features import FeatureReader, TargetFeatures
from pimerge.embedding.store import Store, open_store
from pimerge.embedding.store_schema import MeasuredGains
from pimerge.embedding.strengths import STRENGTHS
from pimerge.models.linear_probe import held_out_log_probabilities
from pimerge.ranking.target import RankRequest, RankTarget, pool_base, pool_of
from pimerge.ranking.target_examples import feature_reader


def calibrate_store(request: RankRequest) -> dict[str, dict[str, dict[float, float]]]:
    """Measure the gain of every expert of the store for every other expert's task, and keep the gains in the store.

    A target is measured again only if its task or the experts have changed, or with ``--force``. A target that cannot
    be measured is left out with a warning.

    Returns:
        target → source → strength → gain.
    """
    store = open_store(Path(request.store))
    done = {} if request.force else store.history()
    problems = Problems()
    for number, name in enumerate(store.experts, 1):
        with problems.collected(f"'{name}': "):
            request.note(f"[{number}/{len(store.experts)}] {name}")
            _calibrate(name, store, done.get(name, {}), request)
    if len(problems.found) >= len(store.experts):
        problems.raise_any("no expert's task can be measured")
    for problem in problems.found:
        request.warn(f"left out: {problem.message}")
    return store.history()


def _calibrate(name: str, store: Store, done: Mapping[str, Mapping[float, float]], request: RankRequest) -> None:
    """Measure the gains for one target, unless they are in the store already."""
    target = RankTarget(name, store.open(name), store.folder_of(name), stored=True)
    if target.task().sha256() != store.experts[name].task_sha256:
        raise PimergeError("its task has changed since it was embedded", "run 'pimerge embed' again")
    experts, _ = pool_of(store, target, pool_base(store, target, request.base))
    if not experts:
        raise PimergeError("no other expert of the store has its base", "embed the whole pool into one store")
    if done.keys() == experts.keys():
        return
    reader = feature_reader(target, store, request)
    with request.track("candidates", (1 + len(experts) * len(STRENGTHS)) * len(reader.labels), "examples") as advance:
        reader.advance = advance
        store.add_gains(name, measure_gains(reader, experts))


def measure_gains(reader: FeatureReader, experts: Mapping[str, Expert]) -> MeasuredGains:
    """Measure gains in accuracy over the bare base on a target's examples, at every strength of every expert.

    The head is a linear probe, and each example is answered by a probe that was fitted without it
    (:func:`pimerge.models.linear_probe.held_out_log_probabilities`). All experts share the same folds.

    Args:
        experts: name → expert, without the target's own.
    """
    base = held_out_accuracy(reader.base_features())
    sources = {
        name: (
            expert.sha256,
            {str(strength): held_out_accuracy(sample) - base for strength, sample in reader.features(expert).items()},
        )
        for name, expert in experts.items()
    }
    return MeasuredGains(task_sha256=reader.task.sha256(), examples=len(reader.labels), sources=sources)


def held_out_accuracy(sample: TargetFeatures) -> float:
    """Return the accuracy on the examples that can be held out."""
    found = held_out_log_probabilities(sample.vectors, sample.labels, sample.classes)
    answered = found.isfinite().all(1)
    return float((found.argmax(1) == sample.labels)[answered].double().mean())
