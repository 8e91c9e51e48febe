"""Rows of a split: columns, labels and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pimerge.tasks.task import open_task
from tests.support.text_rows import (
    LABELS,
    make_task,
    problem_of,
    text_rows,
)


def test_every_unknown_label_is_counted(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, text_rows(["cat", "wolf", "wolf", "emu", "dog"])))
    message = problem_of(lambda: task.rows("train"))
    assert "'wolf' (2 rows: 1-2, from 0)" in message
    assert "'emu' (1 row: 3, from 0)" in message
    assert "dog, cat" in message


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (2, "unknown labels: '2' (2 rows: 0-1, from 0)"),
        (True, "unknown labels: 'true'"),
        (-1, "no label in 2 rows: 0-1 (from 0)"),
        (None, "no label in 2 rows: 0-1 (from 0)"),
        ("", "no label in 2 rows: 0-1 (from 0)"),
        (4.6, "fractions, which are scores, instead of classes: '4.6'"),
        ([0, 1], "holds lists, such as [0, 1]\n  → give each row one class: several labels per row"),
        ({"a": 1}, 'holds objects, such as {"a": 1}'),
    ],
)
def test_a_label_that_is_not_a_class_is_named(tmp_path: Path, label: Any, words: str) -> None:
    rows = [{"text": "a", "label": label}, {"text": "b", "label": label}]
    task = open_task(make_task(tmp_path, rows))
    assert words in problem_of(lambda: task.rows("train"))


def test_a_row_without_a_text_is_named(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, [{"text": None, "label": 0}]))
    assert "no text in 1 row: 0 (from 0)" in problem_of(lambda: task.rows("train"))


def test_wrong_texts_and_labels_are_reported_at_once(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, *({"text": None, "label": 9} for _ in range(6))]
    message = problem_of(lambda: open_task(make_task(tmp_path, rows)).rows("train"))
    assert "no text in 6 rows: 1-6 (from 0)" in message
    assert "unknown labels: '9' (6 rows: 1-6, from 0)" in message


def test_a_missing_column_suggests_the_nearest(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, columns={"text": "txt", "label": "lable"}))
    message = problem_of(lambda: task.rows("train"))
    assert "no column 'txt' for the text" in message
    assert "did you mean 'text'?" in message
    assert "no column 'lable' for the label" in message
    assert "did you mean 'label'?" in message


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"sentence": row["text"], "y": row["label"]} for row in text_rows()]
    task = open_task(make_task(tmp_path, rows, columns={"text": "sentence", "label": "y"}))
    assert task.rows("train")[1] == LABELS
