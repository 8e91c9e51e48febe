"""From judgements by examples to the ranking: order, intervals, the gate, how many are selected, what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.ranking_document import Ranking, Seen, Target
from pimerge.embedding.features import TargetFeatures
from pimerge.ranking import by_examples
from pimerge.ranking.measure import BY_EXAMPLES, MEASURES
from pimerge.ranking.measures import combined
from pimerge.ranking.selection import GainEstimate, SelectionRule
from tests.support.samples import BASE, plain, sample_of

TARGET = Target(name="new", path="tasks/new", sha256="0", expert=False)


@dataclass(frozen=True)
class Named:
    """As much of an expert as a ranking asks for."""

    name: str
    strength: float = 1.0
    kind: str = "lora"
    modules: tuple[str, ...] = ("q",)

    @property
    def path(self) -> Path:
        return Path("experts") / self.name

    @property
    def sha256(self) -> str:
        return f"sha of {self.name}"

    def with_strength(self, strength: float) -> Named:
        return replace(self, strength=strength * self.strength)


class Viewed:
    """A reader that has seen everything: name → signal in the features by scale; the means by their number."""

    labels = BASE.labels

    def __init__(self, signals: dict[str, float], means: Sequence[float] = ()) -> None:
        self.signals, self.means = signals, means
        self.summed: list[list[tuple[str, float]]] = []

    def base_features(self) -> TargetFeatures:
        return BASE

    def features(self, expert: Named) -> dict[float, TargetFeatures]:
        signal = self.signals[expert.name]
        return {0.5: sample_of(signal), 1.0: sample_of(0.1)}

    def mean_features(self, experts: Sequence[Named]) -> TargetFeatures:
        self.summed.append([(expert.name, expert.strength) for expert in experts])
        return sample_of(self.means[len(experts) - 1])

    def notes(self) -> list[str]:
        return ["a note"]

    def seen(self) -> Seen:
        return Seen(examples=30, per_class={"x": 10, "y": 10, "z": 10}, shots=None, limit=None, seed=0)


def ranked(rule: SelectionRule, measure: str = BY_EXAMPLES, means: Sequence[float] = (), **signals: float) -> Ranking:
    reader: Any = Viewed(signals, means)
    experts: Any = {name: Named(name) for name in signals}
    gone = {"gone": "its folder is gone"}
    return by_examples.rank_by_examples(reader, experts, gone, TARGET, None, MEASURES.load(measure), rule)


def test_the_best_that_are_expected_to_help_are_selected_at_their_scale() -> None:
    ranking = ranked(SelectionRule(2), weak=0.0, strong=2.0, good=1.2, fair=0.9)
    assert [candidate.name for candidate in ranking.candidates] == ["strong", "good", "fair", "weak"]
    assert ranking.selected == ["strong", "good"]
    assert [candidate.helps for candidate in ranking.candidates] == [True, True, True, False]
    assert [(candidate.scale, candidate.path) for candidate in ranking.chosen()] == [
        (0.5, "experts/strong"),
        (0.5, "experts/good"),
    ]
    assert {other.name: other.reason for other in ranking.not_comparable} == {"gone": "its folder is gone"}
    assert ranking.why.startswith("the 2 best of 4 experts by 'combined' on 30 examples")
    assert ranking.notes == ["the target has no expert, so its examples alone decide", "a note"]
    assert ranking.target == TARGET


def test_the_score_of_combined_is_the_gain_and_of_another_measure_its_own() -> None:
    combined, logme = ranked(SelectionRule(1), good=1.2), ranked(SelectionRule(1), "logme", good=1.2)
    (first,), (second,) = combined.candidates, logme.candidates
    assert combined.base_score == 0
    assert (first.score, first.low, first.high) == (first.gain, first.gain_low, first.gain_high)
    assert logme.base_score == pytest.approx(plain(MEASURES.load("logme"), BASE))
    assert second.score == pytest.approx(plain(MEASURES.load("logme"), sample_of(1.2)))
    assert (second.gain, second.gain_low, second.gain_high) == (first.gain, first.gain_low, first.gain_high)
    for candidate in (first, second):
        assert candidate.low < candidate.score < candidate.high
        assert candidate.gain_low < candidate.gain < candidate.gain_high


def test_if_none_helps_none_is_selected_unless_the_gate_is_off() -> None:
    shut, off = ranked(SelectionRule(1), a=0.0, b=0.0), ranked(SelectionRule(1, gate=False), a=0.0, b=0.0)
    assert (shut.selected, off.selected) == ([], ["a"])  # equal scores: by name
    assert shut.why.startswith("no expert is expected to help, of 2 experts")
    assert [candidate.helps for candidate in off.candidates] == [False, False]
    nobody = ranked(SelectionRule(1))
    assert (nobody.candidates, nobody.selected) == ([], [])
    assert nobody.why == "no expert of the store can be compared with new"


def test_a_gain_that_stands_out_but_not_by_three_errors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = {
        "slight": GainEstimate(1.0, 0.025, 0.01, 0.025, 0.01),
        "sure": GainEstimate(1.0, 0.02, 0.005, 0.02, 0.005),
    }
    monkeypatch.setattr(by_examples, "judge", lambda *_, **__: by_examples.PoolEstimate(0.0, judged, {}))
    both, one, ungated = (
        ranked(rule, slight=0.0, sure=0.0)
        for rule in (SelectionRule(2), SelectionRule(1), SelectionRule(2, gate=False))
    )
    assert (both.selected, one.selected, ungated.selected) == (["sure"], ["sure"], ["slight", "sure"])
    said = [sum("not selected: slight:" in note for note in ranking.notes) for ranking in (both, one, ungated)]
    assert said == [1, 0, 0]


def test_auto_takes_the_first_so_many_whose_mean_gains_most() -> None:
    reader: Any = Viewed({"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.0}, means=[1.0, 2.0, 0.5])
    experts: Any = {name: Named(name) for name in reader.signals}
    ranking = by_examples.rank_by_examples(
        reader, experts, {}, TARGET, None, MEASURES.load(BY_EXAMPLES), SelectionRule(None)
    )
    assert reader.summed == [[(name, 0.5) for name in "abc"[:count]] for count in (1, 2, 3)]
    assert ranking.selected == ["a", "b"]
    assert ranking.k == 2
    assert sum("expected gain of the mean of the first" in note for note in ranking.notes) == 3
    assert ranked(SelectionRule(None), d=0.0).selected == []


def test_auto_adds_what_the_store_foretells_at_the_scale_of_each() -> None:
    reader: Any = Viewed({"a": 2.0, "b": 1.5}, means=[1.0, 1.0])
    experts: Any = {name: Named(name) for name in reader.signals}
    prior = {"a": 0.02, "b": 0.1}
    ranking = by_examples.rank_by_examples(
        reader, experts, {}, TARGET, None, MEASURES.load(BY_EXAMPLES), SelectionRule(None), prior
    )
    assert [(candidate.name, candidate.scale) for candidate in ranking.candidates] == [("b", 0.5), ("a", 0.5)]
    seen = plain(combined, sample_of(1.0)) - plain(combined, BASE)
    foretold = [0.5 * 0.1, (0.5 * 0.1 + 0.5 * 0.02) / 2]
    said = [note.rsplit(" ", 2)[1] for note in ranking.notes if "expected gain of the mean" in note]
    assert said == [f"{100 * (seen + each):+.1f}" for each in foretold]
    assert ranking.selected == ["b"]
