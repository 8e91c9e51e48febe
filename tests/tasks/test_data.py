"""Data files and their splits, against the rows that the tests wrote themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, Features, Value

from pimerge.tasks.task import open_task
from tests.support.text_rows import (
    LABELS,
    TEXTS,
    WRITERS,
    make_task,
    problem_of,
    text_rows,
    write_table,
)


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_and_labels_are_the_same_in_every_format(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"train.{ending}", text_rows())
    task = open_task(make_task(tmp_path, [], data={"train": f"train.{ending}"}))
    rows, labels = task.rows("train")
    assert list(rows["text"]) == TEXTS
    assert labels == LABELS


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": Value("int64")})
    Dataset.from_dict({"text": [], "label": []}, features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert f"the train split 'train' of '{task.path}' is empty" in problem_of(lambda: task.rows("train"))


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, splits={"train": "train[5:]"}))
    assert "is empty" in problem_of(lambda: task.rows("train"))


def test_a_missing_split_suggests_the_nearest(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, splits={"train": "trian"}))
    message = problem_of(lambda: task.rows("train"))
    assert "'trian'" in message
    assert "did you mean 'train'?" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, data={"train": "gone.jsonl", "test": "gone too.csv"}))
    message = problem_of(lambda: task.rows("train"))
    assert f"there is no data file '{tmp_path / 'gone.jsonl'}'" in message
    assert f"there is no data file '{tmp_path / 'gone too.csv'}'" in message


def test_splits_may_have_files_of_several_formats(tmp_path: Path) -> None:
    write_table(",")(tmp_path / "test.csv", text_rows())
    write_table("\t")(tmp_path / "more.tsv", text_rows())
    data = {"train": ["train.jsonl", "more.tsv"], "test": "test.csv"}
    task = open_task(make_task(tmp_path, text_rows([str(label) for label in LABELS]), data=data))
    assert list(task.rows("train")[0]["text"]) == TEXTS * 2
    assert task.rows("test")[1] == LABELS


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xls").write_bytes(b"")
    task = open_task(make_task(tmp_path, data={"train": "train.xls"}))
    assert "'train.xls' ends in '.xls'" in problem_of(lambda: task.rows("train"))


def test_a_broken_file_is_named_with_its_task(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert f"the split 'train' of '{tmp_path / 'task.json'}' cannot be read" in problem_of(lambda: task.rows("train"))


def test_one_file_may_serve_two_splits_by_slices(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, splits={"train": "train[:3]", "test": "train[3:]"}, data="train.jsonl"))
    assert list(task.rows("train")[0]["text"]) == TEXTS[:3]
    assert list(task.rows("test")[0]["text"]) == TEXTS[3:]
