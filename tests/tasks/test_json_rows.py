"""JSON and JSON lines: the rows that were written, or what the file is instead."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pimerge.tasks.task import open_task
from tests.support.tasks import write_json
from tests.support.text_rows import problem_of

ROWS = [{"text": "2020-01-01", "label": "pos"}, {"text": "a\u2028b", "label": "neg", "more": {"a": 1}}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def task_of(folder: Path, content: str | bytes, file: str = "d.json", **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    document = {"type": "text-classification", "data": {"train": file}, "labels": ["neg", "pos"], **fields}
    write_json(folder / "task.json", document)
    return folder


def refused(folder: Path) -> str:
    return problem_of(lambda: open_task(folder).rows("train"))


@pytest.mark.parametrize("file", ["d.json", "d.jsonl", "d.ndjson", "d.ndjson.gz", "d.JSON.gz"])
@pytest.mark.parametrize("content", [LINES, LINES + "\n", "\ufeff" + json.dumps(ROWS), json.dumps(ROWS, indent=1)])
def test_both_forms_are_read_under_every_ending(tmp_path: Path, file: str, content: str) -> None:
    stored = gzip.compress(content.encode()) if file.endswith(".gz") else content
    rows, labels = open_task(task_of(tmp_path, stored, file)).rows("train")
    assert list(rows["text"]) == [row["text"] for row in ROWS]
    assert labels == [1, 0]
    assert list(rows["more"]) == [None, {"a": 1}]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"tokens": ["a", "b"], "labels": ["neg", "pos"]}
    task = open_task(task_of(tmp_path, json.dumps(row), type="token-classification"))
    assert list(task.rows("train")[0]["tokens"]) == [["a", "b"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"data": ROWS}), "one object whose field 'data' holds the rows"),
        (json.dumps({"version": 2, "data": ROWS}, indent=1), "one object whose field 'data' holds the rows"),
        (json.dumps({"train": ROWS, "test": ROWS}), "one object whose field 'train' holds the rows"),
        (json.dumps({"columns": ["text"], "data": [["a"]]}), "one object whose field 'data' holds the rows"),
        (json.dumps({"text": {"0": "a"}, "label": {"0": "pos"}}), "columnar JSON"),
        (json.dumps({"text": ["a", "b"], "label": ["pos", "neg"]}), "columnar JSON"),
        ("", "is empty"),
        ("[]", "is empty"),
        ('{"text": "a"', "not valid JSON"),
        ("[1, 2]", "2 rows of"),
        ('"text"', 'holds "text"'),
        ('{"text": "a", "label": "pos"}\n{"text": \n[]\n', "2 rows of"),
        ('[{"text": "\\ud800", "label": "pos"}]', "half of a surrogate pair"),
        ('[{"text": "a", "label": "pos"}, {"text": ["b"], "label": "neg"}]', "mixes lists and texts"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_list_of_rows_is_named(tmp_path: Path, content: str, words: str) -> None:
    assert words in refused(task_of(tmp_path, content))


def test_files_of_one_split_may_have_numbers_and_texts(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "b", "label": "1"}\n')
    folder = task_of(tmp_path, '{"text": 7, "label": 0}', data={"train": ["d.json", "more.jsonl"]})
    rows, labels = open_task(folder).rows("train")
    assert (list(rows["text"]), labels) == (["7", "b"], [0, 1])


def test_whole_numbers_among_words_are_words(tmp_path: Path) -> None:
    rows = [{"tokens": ["in", 1984], "labels": ["neg", "pos"]}, {"tokens": [7], "labels": ["neg"]}]
    task = open_task(task_of(tmp_path, json.dumps(rows), type="token-classification"))
    assert list(task.rows("train")[0]["tokens"]) == [["in", "1984"], ["7"]]


def test_whole_numbers_among_texts_are_texts(tmp_path: Path) -> None:
    rows = [{"text": 7, "label": "1", "id": 2**70}, {"text": "a", "label": 2, "id": 1}]
    found, labels = open_task(task_of(tmp_path, json.dumps(rows), labels=["2", "1"])).rows("train")
    assert list(found["text"]) == ["7", "a"]
    assert labels == [1, 0]
