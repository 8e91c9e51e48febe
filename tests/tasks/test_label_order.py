"""Answers that are wrong because classes were renamed."""

from __future__ import annotations

import random

import pytest

from pimerge.tasks.label_order import label_order_remark

NAMES = ["a", "b", "c", "d"]
RIGHT = [index % 4 for index in range(80)]


def remark(order: list[int], errors: int = 0) -> str:
    chosen = [order[label] if place >= errors else (order[label] + 1) % 4 for place, label in enumerate(RIGHT)]
    return label_order_remark(chosen, RIGHT, NAMES, "the examples")


@pytest.mark.parametrize(
    ("order", "errors", "accuracies"),
    [
        ([1, 2, 3, 0], 0, "accuracy 0% on the examples, and 100% if the labels were in the order d, a, b, c"),
        ([3, 2, 1, 0], 8, "and 90% if the labels were in the order d, c, b, a"),
        ([1, 0, 2, 3], 0, "accuracy 50% on the examples, and 100% if the labels were in the order b, a, c, d"),
    ],
)
def test_another_order_is_named(order: list[int], errors: int, accuracies: str) -> None:
    assert accuracies in remark(order, errors)


@pytest.mark.parametrize("errors", [0, 8, 40])
def test_the_right_order_is_not_suspected(errors: int) -> None:
    assert remark([0, 1, 2, 3], errors) == ""


@pytest.mark.parametrize("seed", range(20))
def test_guesses_are_not_suspected(seed: int) -> None:
    generator = random.Random(seed)
    assert label_order_remark([generator.randrange(4) for _ in RIGHT], RIGHT, NAMES, "the examples") == ""
    assert label_order_remark([seed % 4] * len(RIGHT), RIGHT, NAMES, "the examples") == ""


def test_words_count_one_by_one() -> None:
    assert "100%" in label_order_remark([[1, 0]] * 10, [[0, 1]] * 10, ["O", "X"], "the words")
    assert label_order_remark([None] * 30, [0] * 30, ["O", "X"], "the words") == ""
