"""From the store to the ranking: the gate of a measure, and the gains that the pool had."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Target
from pimerge.core.errors import PimergeError
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings, MeasuredGains
from pimerge.models.loading import Bases
from pimerge.ranking.by_store import rank_by_history, rank_by_store
from pimerge.ranking.measure import MEASURES
from pimerge.ranking.selection import SelectionRule
from tests.support.experts import MakeExpert

TARGET = Target(name="new", path="tasks/new", sha256="0", expert=False)


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> dict[str, Expert]:
    folder = tmp_path_factory.mktemp("pool")
    names = ("a", "b", "c", "x")
    experts = {
        name: open_expert(make_expert(folder / name, bert_base, text_task, seed=seed))
        for seed, name in enumerate(names)
    }
    store, bases = Store(folder / "embeddings.json"), Bases(torch.device("cpu"), torch.float32)
    for expert in experts.values():
        embed_expert(expert, check_expert(expert), store, EmbedSettings(max_examples=8), bases)
    return experts


@pytest.fixture
def store(pool: dict[str, Expert], tmp_path: Path) -> Store:
    return Store(pool["x"].path.parent / "embeddings.json").overlay(tmp_path)


def test_by_the_store_the_gate_is_the_measures_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = rank_by_store(store, "x", MEASURES.load("fisher"), SelectionRule(3, gate=False))
    scores = {candidate.name: candidate.score for candidate in off.candidates}
    changed = replace(MEASURES.load("fisher"), threshold=list(scores.values())[1])
    monkeypatch.setattr("pimerge.ranking.measures.fisher.MEASURE", changed)
    gated = rank_by_store(store, "x", MEASURES.load("fisher"), SelectionRule(3))
    assert gated.selected == list(scores)[:1]
    assert [candidate.helps for candidate in gated.candidates] == [True, False, False]
    assert off.selected == list(scores)
    auto = rank_by_store(store, "x", MEASURES.load("fisher"), SelectionRule(None, gate=False))
    gaps = [first - second for first, second in itertools.pairwise(scores.values())]
    assert auto.selected == list(scores)[: 1 + gaps.index(max(gaps))]


def with_gains(store: Store, pool: dict[str, Expert], gains: dict[str, dict[str, list[float]]]) -> Store:
    for target, sources in gains.items():
        by_scale = {
            name: (pool[name].sha256, dict(zip(("0.5", "1.0"), values, strict=True)))
            for name, values in sources.items()
        }
        task_sha256 = store.experts[target].task_sha256
        store.add_gains(target, MeasuredGains(task_sha256=task_sha256, examples=9, sources=by_scale))
    return store


GAINS = {
    "a": {"b": [0.03, 0.01], "c": [-0.01, -0.02]},
    "b": {"a": [0.01, 0.04], "c": [-0.03, -0.02]},
    "c": {"a": [0.02, 0.05], "b": [0.02, 0.01]},
    "x": {"a": [0.9, 0.9], "b": [0.9, 0.9], "c": [0.9, 0.9]},
}


def test_by_history_the_mean_gain_for_others_counts(store: Store, pool: dict[str, Expert], tmp_path: Path) -> None:
    experts = {name: expert for name, expert in pool.items() if name != "x"}
    target = Target(name="x", path="tasks/x", sha256="0", expert=False)
    ranking = rank_by_history(
        with_gains(store, pool, GAINS), experts, {}, target, MEASURES.load("history"), SelectionRule(3)
    )
    assert [candidate.name for candidate in ranking.candidates] == ["a", "b", "c"]
    assert [candidate.scale for candidate in ranking.candidates] == [1.0, 0.5, 0.5]
    assert [candidate.score for candidate in ranking.candidates] == pytest.approx([0.045, 0.025, -0.02])
    assert [candidate.high - candidate.low for candidate in ranking.candidates] == pytest.approx(
        [2 * 1.96 * 0.005, 2 * 1.96 * 0.005, 2 * 1.96 * 0.01], rel=1e-3
    )
    assert ranking.selected == ["a", "b"]
    assert ranking.base_score == 0
    assert ranking.notes == ["from the gains for 3 other targets, weighted alike, since it is not in the store"]


def test_by_history_a_single_gain_has_no_error_to_stand_out_from(
    store: Store, pool: dict[str, Expert], tmp_path: Path
) -> None:
    one = with_gains(store, pool, {"a": GAINS["a"]})
    experts = {name: expert for name, expert in pool.items() if name != "x"}
    own = Target(name="x", path="x", sha256=pool["x"].sha256)
    ranking = rank_by_history(one, experts, {}, own, MEASURES.load("history"), SelectionRule(3))
    assert ranking.selected == []
    assert [candidate.name for candidate in ranking.candidates] == ["b", "c"]
    assert all(candidate.high - candidate.low == pytest.approx(2 * 1.96, rel=1e-3) for candidate in ranking.candidates)
    assert {other.name for other in ranking.not_comparable} == {"a"}
    assert "weighted by their similarity" in ranking.notes[0]


def test_without_any_history_it_says_what_to_run(store: Store, pool: dict[str, Expert], tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="has no gains") as caught:
        rank_by_history(store, pool, {}, TARGET, MEASURES.load("history"), SelectionRule())
    assert "--calibrate" in str(caught.value)
