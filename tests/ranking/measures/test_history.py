"""The gains of the past, weighted: against sums in a loop."""

from __future__ import annotations

import math

import pytest

from pimerge.ranking.measures.history import predicted

GAINS = {
    "a": {"s": {0.5: 0.01, 1.0: 0.06}, "b": {0.5: 0.5, 1.0: 0.5}},
    "b": {"s": {0.5: 0.03, 1.0: -0.02}, "a": {0.5: 0.5, 1.0: 0.5}},
    "c": {"s": {0.5: 0.04, 1.0: 0.01}},
    "s": {"a": {0.5: 0.1, 1.0: 0.1}},
}


@pytest.mark.parametrize("near", [{}, {"a": 0.3}, {"a": 0.1, "b": -0.2, "c": 0.05}, {"unknown": 1.0}])
def test_gain_and_scale_are_those_of_the_weighted_means(near: dict[str, float]) -> None:
    weights = [math.exp(near.get(target, 0.0) / 0.1) for target in "abc"]
    means = {
        scale: sum(w * GAINS[t]["s"][scale] for w, t in zip(weights, "abc", strict=True)) / sum(weights)
        for scale in (0.5, 1.0)
    }
    best = 1.0 if means[1.0] > means[0.5] else 0.5
    effective = sum(weights) ** 2 / sum(w**2 for w in weights)
    squares = [w * (GAINS[t]["s"][best] - means[best]) ** 2 for w, t in zip(weights, "abc", strict=True)]
    error = math.sqrt(sum(squares) / sum(weights) / (effective - 1))
    found = predicted(GAINS, near, "s")
    assert found == pytest.approx((best, means[best], error), abs=1e-12)


def test_the_cases_differ_in_their_scale() -> None:
    scales = {(predicted(GAINS, near, "s") or (0,))[0] for near in ({}, {"a": 0.3})}
    assert scales == {0.5, 1.0}


def test_alike_weights_give_the_plain_standard_error() -> None:
    found = predicted(GAINS, {}, "s")
    values = [0.01, 0.03, 0.04]
    mean = sum(values) / 3
    plain = math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)
    assert found == pytest.approx((0.5, mean, plain), abs=1e-12)


def test_a_source_says_nothing_of_itself() -> None:
    assert predicted({"s": {"s": {1.0: 0.5}}}, {}, "s") is None
    assert predicted(GAINS, {}, "unknown") is None
    assert predicted({}, {}, "s") is None


def test_one_target_alone_has_no_error_to_speak_of() -> None:
    found = predicted({"a": {"s": {1.0: 0.5}}}, {"a": 1.0}, "s")
    assert found == (1.0, 0.5, math.inf)


def test_one_target_that_is_far_nearer_than_all_others_decides_alone() -> None:
    found = predicted(GAINS, {"a": 5.0}, "s")
    assert found == (1.0, pytest.approx(0.06, abs=1e-9), math.inf)
