"""Plots of a comparison: the numbers are those of its runs."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

from pimerge.core.errors import PimergeError
from pimerge.evaluation.schema import ComparisonDocument
from pimerge.reporting.figure import Figure
from pimerge.reporting.figures import experts, shift, shots
from tests.support import looks
from tests.support.documents import comparison, score

DOCUMENT = comparison(["head", "scratch", "learned", "uniform"])


def mean(method: str, number: int | None, k: int, test: str = "test") -> float:
    return statistics.fmean(score(method, number, k, seed, test) for seed in (0, 1))


@pytest.mark.parametrize(("k", "expected"), [(None, 4), (1, 1)])
def test_curves_over_shots_are_those_of_one_number_of_experts(k: int | None, expected: int) -> None:
    data = shots.FIGURE.compute(DOCUMENT, k=k)
    assert (data.k, data.percent, data.seeds) == (expected, True, 2)
    assert [(series.method, series.control) for series in data.series] == [
        ("head", True),
        ("scratch", True),
        ("learned", False),
        ("uniform", False),
    ]
    for series in data.series:
        own = 0 if series.control else expected  # the controls have no other number
        assert series.shots == [1, 5, None]
        assert series.mean == pytest.approx([mean(series.method, number, own) for number in (1, 5, None)])
        assert series.sd == pytest.approx([0.01 / 2**0.5] * 3)


@pytest.mark.parametrize(("asked", "number"), [(None, 1), ("5", 5), ("all", None)])
def test_curves_over_experts_are_those_of_one_number_of_shots(asked: str | None, number: int | None) -> None:
    data = experts.FIGURE.compute(DOCUMENT, shots=asked)
    assert data.shots == number
    for series in data.series:
        assert series.k == ([0] if series.control else [1, 2, 4])
        assert series.mean == pytest.approx([mean(series.method, number, k) for k in series.k])


def test_drops_are_paired_by_run() -> None:
    document = comparison(["learned"], tests=("test", "noisy", "inverted"))
    document.runs[-1].scores["inverted"] = 0.0
    data = shift.FIGURE.compute(document, k=4)
    assert (data.shots, data.k, data.tests) == (None, 4, ["noisy", "inverted"])
    (learned,) = data.methods
    assert learned.score == pytest.approx(mean("learned", None, 4))
    noisy, inverted = learned.drops
    assert (noisy.drop, noisy.sd) == (pytest.approx(0.05), pytest.approx(0.0, abs=1e-9))
    lost = [0.05, score("learned", None, 4, 1, "test")]
    assert (inverted.drop, inverted.sd) == (pytest.approx(np.mean(lost)), pytest.approx(np.std(lost, ddof=1)))


@pytest.mark.parametrize(
    ("figure", "document", "options", "expected"),
    [
        (shots.FIGURE, comparison(["head"], numbers=(5,)), {}, r"have 5 shots.*\n.*compare --shots 1,5,20"),
        (shots.FIGURE, DOCUMENT, {"k": 3}, r"no runs with 3 experts, but with 0, 1, 2, 4\n.*--experts 3"),
        (
            experts.FIGURE,
            comparison(["head", "learned"], ks=(2,)),
            {},
            r"one number of experts at 1 shots.*\n.*compare --experts 1,2,4",
        ),
        (experts.FIGURE, DOCUMENT, {"shots": "7"}, r"no runs with 7 shots, but with 1, 5, all\n.*--shots 7"),
        (shift.FIGURE, comparison(["head"], tests=("test",)), {}, r"test split alone\n.*--also-test FOLDER"),
        (shift.FIGURE, DOCUMENT, {"shots": "some"}, "no runs with some shots"),
    ],
)
def test_what_the_comparison_lacks_is_said_with_the_option_that_makes_it(
    figure: Figure[Any, Any], document: ComparisonDocument, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(PimergeError, match=expected):
        figure.compute(document, **options)


@pytest.mark.parametrize("count", [1, 12])
def test_they_are_readable_for_any_number_of_methods(count: int) -> None:
    document = comparison([*looks.names(count), "head"], tests=("test", looks.LONG, "noisy"))
    for figure in (shots.FIGURE, experts.FIGURE, shift.FIGURE):
        looks.assert_good(figure, figure.compute(document), ["head"])


def test_a_metric_that_is_no_share_has_numbers() -> None:
    document = comparison(["learned"], metric="cider")
    for figure in (shots.FIGURE, experts.FIGURE, shift.FIGURE):
        data = figure.compute(document)
        assert not data.percent
        looks.assert_good(figure, data)
