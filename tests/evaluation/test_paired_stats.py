"""Paired differences to the best control, and the sentence that sums them up."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from pimerge.evaluation.paired_stats import conclusion, lines_of, paired_difference
from pimerge.evaluation.schema import ComparisonRun

CONTROLS = ["head", "single"]


def runs(method: str, scores: list[float], shots: int | None = 5, k: int = 2) -> list[ComparisonRun]:
    return [
        ComparisonRun(
            method=method,
            shots=shots,
            seed=seed,
            k=k,
            experts=[],
            scores={"test": score},
            losses={"test": 1.0},
            trained_parameters=1,
            deployed_parameters=2,
            epochs=3,
            seconds=seed + 1.0,
        )
        for seed, score in enumerate(scores)
    ]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_the_interval_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    assume(len({round(a - b, 12) for a, b in pairs}) > 1)  # without spread scipy has no interval
    expected = ttest_rel(first, second).confidence_interval()
    found = paired_difference(first, second)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_one_pair_has_no_interval() -> None:
    assert paired_difference([0.5], [0.4]).low is None


def test_each_line_is_compared_with_the_control_of_the_highest_mean() -> None:
    made = [*runs("head", [0.5, 0.6]), *runs("single", [0.7, 0.6]), *runs("learned", [0.8, 0.9])]
    lines = {line.method: line for line in lines_of(made, CONTROLS)}
    assert lines["single"].difference is None
    assert lines["head"].difference == pytest.approx(-0.1)
    assert lines["learned"].difference == pytest.approx(0.2)
    assert (lines["learned"].mean, lines["learned"].sd) == pytest.approx((0.85, 0.05 * 2**0.5))
    assert lines["learned"].seconds == 1.5
    assert [lines[name].control for name in ("head", "single", "learned")] == [True, True, False]


def test_other_shots_and_test_sets_are_lines_of_their_own() -> None:
    made = [*runs("head", [0.5], shots=1), *runs("head", [0.9], shots=None), *runs("learned", [0.6], shots=1)]
    made[0].scores["other"] = 0.1
    found = {(line.method, line.shots, line.test): line.difference for line in lines_of(made, CONTROLS)}
    assert found == {
        ("head", 1, "test"): None,
        ("head", 1, "other"): None,
        ("head", None, "test"): None,
        ("learned", 1, "test"): pytest.approx(0.1),
    }


def test_a_clear_winner_is_named_with_its_gain() -> None:
    made = [*runs("head", [0.50, 0.51, 0.49]), *runs("learned", [0.70, 0.71, 0.70])]
    assert conclusion(made, CONTROLS, "accuracy") == (
        "At 5 shots learned beats the best control (head, 50.0%) by 20.3 points [18.9, 21.8]."
    )


def test_what_is_within_the_noise_is_not_called_a_gain() -> None:
    made = [*runs("head", [0.50, 0.58, 0.49]), *runs("learned", [0.55, 0.56, 0.52])]
    assert conclusion(made, CONTROLS, "accuracy") == (
        "At 5 shots no method can be told from the best control (head, 52.3%)."
    )


def test_many_methods_need_a_clearer_gain_than_one() -> None:
    """The more is tried, the likelier is a gain by luck: the level holds for all comparisons at once."""
    control = runs("head", [0.50, 0.50, 0.50])
    one = [*control, *runs("learned", [0.52, 0.53, 0.54])]
    assert "learned beats" in conclusion(one, CONTROLS, "accuracy")
    more = [*one, *(run for n in range(9) for run in runs(f"m{n}", [0.5, 0.49, 0.51]))]
    assert "no method can be told" in conclusion(more, CONTROLS, "accuracy")


def test_one_seed_tells_nothing() -> None:
    assert "more seeds are needed" in conclusion([*runs("head", [0.5]), *runs("learned", [0.9])], CONTROLS, "accuracy")


def test_without_a_control_nothing_is_claimed() -> None:
    assert conclusion(runs("learned", [0.5, 0.9]), [], "accuracy").startswith("Without a control")
    assert conclusion(runs("head", [0.5, 0.9]), CONTROLS, "accuracy") == "Nothing but controls was run."
