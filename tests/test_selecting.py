"""From judgements to the ranking: order, intervals, the gate, how many are selected, and what is said of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge import strategies
from pimerge.compatibility import check_expert
from pimerge.embedding import embed
from pimerge.errors import PimergeError
from pimerge.expert import Expert, open_expert
from pimerge.model import Bases
from pimerge.ranking import Ranking, Seen, Target
from pimerge.sample import Sample
from pimerge.selecting import BY_EXAMPLES, Wish, rank_by_examples, rank_by_history, rank_by_store, widest_gap
from pimerge.store import Gains, Settings, Store
from tests.conftest import MakeExpert
from tests.test_few_shot import BASE, plain, sample_of

TARGET = Target(name="new", path="tasks/new", sha256="0", expert=False)


@dataclass(frozen=True)
class Named:
    """As much of an expert as a ranking asks for."""

    name: str
    scale: float = 1.0

    @property
    def path(self) -> Path:
        return Path("experts") / self.name

    @property
    def sha256(self) -> str:
        return f"sha of {self.name}"

    def scaled(self, scale: float) -> Named:
        return replace(self, scale=scale * self.scale)


class Viewed:
    """A viewer that has seen everything: name → signal in the features by scale; the means by their number."""

    labels = BASE.labels

    def __init__(self, signals: dict[str, float], means: Sequence[float] = ()) -> None:
        self.signals, self.means = signals, means
        self.summed: list[list[tuple[str, float]]] = []

    def base_sample(self) -> Sample:
        return BASE

    def samples(self, expert: Named) -> dict[float, Sample]:
        signal = self.signals[expert.name]
        return {0.5: sample_of(signal), 1.0: sample_of(0.1)}

    def sum_sample(self, experts: Sequence[Named]) -> Sample:
        self.summed.append([(expert.name, expert.scale) for expert in experts])
        return sample_of(self.means[len(experts) - 1])

    def notes(self) -> list[str]:
        return ["a note"]

    def seen(self) -> Seen:
        return Seen(examples=30, per_class={"x": 10, "y": 10, "z": 10}, shots=None, limit=None, seed=0)


def ranked(wish: Wish, measure: str = BY_EXAMPLES, means: Sequence[float] = (), **signals: float) -> Ranking:
    viewer: Any = Viewed(signals, means)
    experts: Any = {name: Named(name) for name in signals}
    return rank_by_examples(viewer, experts, {"gone": "its folder is gone"}, TARGET, None, measure, wish, Path())


def test_the_best_that_are_expected_to_help_are_selected_at_their_scale() -> None:
    ranking = ranked(Wish(2), weak=0.0, strong=2.0, good=1.2, fair=0.9)
    assert [candidate.name for candidate in ranking.candidates] == ["strong", "good", "fair", "weak"]
    assert ranking.selected == ["strong", "good"]
    assert [candidate.helps for candidate in ranking.candidates] == [True, True, True, False]
    assert [(candidate.scale, candidate.path) for candidate in ranking.chosen()] == [
        (0.5, "experts/strong"),
        (0.5, "experts/good"),
    ]
    assert {other.name: other.reason for other in ranking.not_comparable} == {"gone": "its folder is gone"}
    assert ranking.why.startswith("the 2 best of 4 experts by 'combined' on 30 examples")
    assert ranking.notes == ["the target has no expert: its examples alone decide", "a note"]
    assert ranking.target == TARGET


def test_the_score_of_combined_is_the_gain_and_of_another_measure_its_own() -> None:
    combined, logme = ranked(Wish(1), good=1.2), ranked(Wish(1), "logme", good=1.2)
    (first,), (second,) = combined.candidates, logme.candidates
    assert combined.base_score == 0
    assert (first.score, first.low, first.high) == (first.gain, first.gain_low, first.gain_high)
    assert logme.base_score == pytest.approx(plain(strategies.load("measures", "logme"), BASE))
    assert second.score == pytest.approx(plain(strategies.load("measures", "logme"), sample_of(1.2)))
    assert (second.gain, second.gain_low, second.gain_high) == (first.gain, first.gain_low, first.gain_high)
    for candidate in (first, second):
        assert candidate.low < candidate.score < candidate.high
        assert candidate.gain_low < candidate.gain < candidate.gain_high


def test_if_none_helps_none_is_selected_unless_the_gate_is_off() -> None:
    shut, off = ranked(Wish(1), a=0.0, b=0.0), ranked(Wish(1, gate=False), a=0.0, b=0.0)
    assert (shut.selected, off.selected) == ([], ["a"])  # equal scores: by name
    assert shut.why.startswith("no expert is expected to help, of 2 experts")
    assert [candidate.helps for candidate in off.candidates] == [False, False]
    nobody = ranked(Wish(1))
    assert (nobody.candidates, nobody.selected) == ([], [])
    assert nobody.why == "no expert of the store can be compared with new"


def test_auto_takes_the_first_so_many_whose_mean_gains_most() -> None:
    viewer: Any = Viewed({"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.0}, means=[1.0, 2.0, 0.5])
    experts: Any = {name: Named(name) for name in viewer.signals}
    ranking = rank_by_examples(viewer, experts, {}, TARGET, None, BY_EXAMPLES, Wish(None), Path())
    assert viewer.summed == [[(name, 0.5) for name in "abc"[:count]] for count in (1, 2, 3)]
    assert ranking.selected == ["a", "b"]
    assert ranking.k == 2
    assert sum("expected gain of the mean of the first" in note for note in ranking.notes) == 3
    assert ranked(Wish(None), d=0.0).selected == []


def test_the_widest_gap_is_before_the_first_that_is_far() -> None:
    assert widest_gap([0.9, 0.8, 0.75, 0.1, 0.0]) == 3
    assert widest_gap([0.9, 0.1, 0.09]) == 1
    assert widest_gap([0.9, 0.7, 0.6, 0.0]) == 3
    assert widest_gap([0.9, 0.7, 0.6, 0.0], most=2) == 1  # how far the fourth is, is not looked at
    assert widest_gap([0.4]) == 1
    assert widest_gap([]) == 0


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
        embed(expert, check_expert(expert), store, Settings(max_examples=8), bases)
    return experts


@pytest.fixture
def store(pool: dict[str, Expert], tmp_path: Path) -> Store:
    return Store(pool["x"].path.parent / "embeddings.json").overlay(tmp_path)


def test_by_the_store_the_gate_is_the_measures_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = rank_by_store(store, "x", "fisher", Wish(3, gate=False), tmp_path)
    scores = {candidate.name: candidate.score for candidate in off.candidates}
    monkeypatch.setattr("pimerge.measures.fisher.GATE", list(scores.values())[1])
    gated = rank_by_store(store, "x", "fisher", Wish(3), tmp_path)
    assert gated.selected == list(scores)[:1]
    assert [candidate.helps for candidate in gated.candidates] == [True, False, False]
    assert off.selected == list(scores)
    auto = rank_by_store(store, "x", "fisher", Wish(None, gate=False), tmp_path)
    gaps = [first - second for first, second in itertools.pairwise(scores.values())]
    assert auto.selected == list(scores)[: 1 + gaps.index(max(gaps))]


def with_gains(store: Store, pool: dict[str, Expert], gains: dict[str, dict[str, list[float]]]) -> Store:
    for target, sources in gains.items():
        by_scale = {
            name: (pool[name].sha256, dict(zip(("0.5", "1.0"), values, strict=True)))
            for name, values in sources.items()
        }
        task_sha256 = store.experts[target].task_sha256
        store.add_gains(target, Gains(task_sha256=task_sha256, examples=9, sources=by_scale))
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
    ranking = rank_by_history(with_gains(store, pool, GAINS), experts, {}, target, Wish(3), tmp_path)
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
    ranking = rank_by_history(one, experts, {}, own, Wish(3), tmp_path)
    assert ranking.selected == []
    assert [candidate.name for candidate in ranking.candidates] == ["b", "c"]
    assert all(candidate.high - candidate.low == pytest.approx(2 * 1.96, rel=1e-3) for candidate in ranking.candidates)
    assert {other.name for other in ranking.not_comparable} == {"a"}
    assert "weighted by their similarity" in ranking.notes[0]


def test_without_any_history_it_says_what_to_run(store: Store, pool: dict[str, Expert], tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="has no gains") as caught:
        rank_by_history(store, pool, {}, TARGET, Wish(), tmp_path)
    assert "--calibrate" in str(caught.value)
