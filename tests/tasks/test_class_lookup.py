"""A cell means the class whose name its text is, in every format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from pimerge.tasks.task import Task, open_task
from tests.support.tasks import write_json
from tests.support.text_rows import problem_of

STARS = ["1", "2", "3", "4", "5"]
CASES = [
    (STARS, [1, 2, 3, 4], [0, 1, 2, 3]),
    (STARS, ["5", "1"], [4, 0]),
    (["1", "0"], [1, 0], [0, 1]),
    (["0", "4"], [4, 0], [1, 0]),
    (["-1", "0", "1"], [-1, 1], [0, 2]),
    (["neg", "pos"], [1, 0], [1, 0]),
    (["neg", "pos"], ["1", "0"], [1, 0]),
    (["10", "20"], [1, 0], [1, 0]),
    (["00", "01"], [1, 0], [1, 0]),
    (["None", "NA"], ["NA", "None"], [1, 0]),
    (["1.5", "2.5"], [2.5, 1.5], [1, 0]),
]


def task_of(folder: Path, labels: Sequence[str], values: Sequence[Any], file: str, **fields: Any) -> Path:
    rows = [{"text": f"t{place}", "label": value} for place, value in enumerate(values)]
    if file.endswith(".csv"):
        lines = [f"{row['text']},{'' if row['label'] is None else row['label']}" for row in rows]
        (folder / file).write_text("\n".join(["text,label", *lines]))
    elif file.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(str(folder / file))
    else:
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {"type": "text-classification", "data": {"train": file, "test": file}, "labels": list(labels), **fields}
    write_json(folder / "task.json", document)
    return folder


@pytest.mark.parametrize("file", ["d.csv", "d.jsonl", "d.parquet"])
@pytest.mark.parametrize(("labels", "values", "right"), CASES)
def test_a_cell_is_the_class_of_its_text(
    tmp_path: Path, labels: list[str], values: list[Any], right: list[int], file: str
) -> None:
    assert open_task(task_of(tmp_path, labels, values, file)).rows("train")[1] == right
    rows = [{"text": "a", "label": value} for value in values]
    assert Task.from_rows(rows, labels=labels).rows("train")[1] == right


@pytest.mark.parametrize(("labels", "right"), [(["False", "True"], [1, 0]), (["true", "false"], [0, 1])])
def test_true_and_false_are_the_classes_of_these_names(labels: list[str], right: list[int]) -> None:
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    assert Task.from_rows(rows, labels=labels).rows("train")[1] == right


@pytest.mark.parametrize("file", ["d.csv", "d.jsonl", "d.parquet"])
@pytest.mark.parametrize(
    ("labels", "values", "seen"),
    [
        (["01", "02", "03"], [1, 2], "'1' (1 row: 0, from 0), '2'"),
        (STARS, [0, 1, 2], "'0' (1 row: 0"),
        (["yes", "no"], [True, False], "'true'"),
        (["neg", "pos"], [0, 2, 2], "'2' (2 rows: 1-2"),
        (["neg", "pos"], ["pos", "0"], "'0' (1 row: 1"),
        (["neg", "pos"], ["pos", " pos"], "' pos' (1 row: 1"),
        (["neg", "pos"], ["Pos", "neg"], "'Pos'"),
        (["neg", "pos"], [4.6, 1.0], "scores, instead of classes: '4.6' (1 row: 0, from 0), '1.0'"),
        (["neg", "pos"], [1, 0, -1, None, -1], "no label in 3 rows: 2-4 (from 0)"),
    ],
)
def test_anything_else_is_refused_with_the_values_seen(
    tmp_path: Path, labels: list[str], values: list[Any], seen: str, file: str
) -> None:
    message = problem_of(lambda: open_task(task_of(tmp_path, labels, values, file)).rows("train"))
    seen = seen.replace("'true'", "'True'") if file == "d.csv" else seen
    assert message.count(seen) == 1, message


@pytest.mark.parametrize(
    ("own", "labels", "values", "right"),
    [
        (["neg", "pos"], ["pos", "neg"], [0, 1], [1, 0]),
        (["0", "1"], ["1", "0"], [0, 1], [1, 0]),
        (["negative", "positive"], ["neg", "pos"], [0, 1], [0, 1]),
    ],
)
def test_a_class_label_is_its_own_name(
    tmp_path: Path, own: list[str], labels: list[str], values: list[int], right: list[int]
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=own)})
    table = Dataset.from_dict({"text": ["a", "b"], "label": values}, features=features)
    table.to_parquet(str(tmp_path / "d.parquet"))
    fields = {"type": "text-classification", "data": {"train": "d.parquet"}, "labels": labels}
    write_json(tmp_path / "task.json", fields)
    assert open_task(tmp_path).rows("train")[1] == right


@pytest.mark.parametrize("file", ["d.csv", "d.jsonl"])
def test_rows_without_a_label_can_be_left_out(tmp_path: Path, bert_base: Path, file: str) -> None:
    from transformers import AutoConfig

    folder = task_of(tmp_path, ["neg", "pos"], [1, -1, None, 0], file, skip_unlabelled=True)
    task = open_task(folder)
    rows, labels = task.rows("train")
    assert list(rows["text"]) == ["t0", "t3"]
    assert labels == [1, 0]
    processor = task.type.load_processor(str(bert_base), None)
    examples, _ = task.examples("train", processor, AutoConfig.from_pretrained(bert_base))
    assert examples.remarks() == ["2 rows have no label and were left out"]
    assert task.sha256() != open_task(task_of(tmp_path, ["neg", "pos"], [1, -1, None, 0], file)).sha256()


def test_sentences_with_unlabelled_words_can_be_left_out(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["a", "b"], "labels": [0, 1]},
        {"tokens": ["c"], "labels": [-1]},
        {"tokens": ["d"], "labels": [1]},
    ]
    fields = {"type": "token-classification", "labels": ["O", "X"]}
    assert "no label in 1 word in rows: 1" in problem_of(lambda: Task.from_rows(rows, **fields).rows("train"))
    task = Task.from_rows(rows, **fields, skip_unlabelled=True)
    assert list(task.rows("train")[0]["tokens"]) == [["a", "b"], ["d"]]


def test_labels_of_words_that_are_no_lists_are_refused(tmp_path: Path) -> None:
    rows = [{"tokens": ["a"], "labels": 1}]
    task = Task.from_rows(rows, type="token-classification", labels=["O", "X"], skip_unlabelled=True)
    assert "holds no lists" in problem_of(lambda: task.rows("train"))
