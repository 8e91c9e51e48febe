"""A text is what the file holds; what is no text is refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset

from pimerge.core.errors import PimergeError
from pimerge.tasks.task import Task, open_task
from pimerge.tasks.types._templates import Template
from tests.support.tasks import write_json
from tests.support.text_rows import problem_of

FIELDS: dict[str, Any] = {"type": "text-classification", "labels": ["neg", "pos"]}


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), ("café".encode(), "café"), ("007", "007"), (2**63 - 1, str(2**63 - 1))]
)
@pytest.mark.parametrize("column", ["text", "text_pair"])
def test_numbers_and_bytes_are_read_as_text(value: Any, text: str, column: str) -> None:
    rows = [{"text": "a", "label": "pos", column: value}]
    task = Task.from_rows(rows, **FIELDS, columns={"text_pair": "text_pair"} if column == "text_pair" else None)
    assert list(task.rows("train")[0][column]) == [text]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"en": "good"}, 'holds objects, such as {"en": "good"}'),
        (["good", "film"], 'holds lists, such as ["good", "film"]'),
        (1.5, "holds numbers with fractions, such as 1.5"),
        (True, "holds true and false"),
        (datetime.date(2020, 1, 1), "holds dates or times"),
        (b"\xff", "row 0 (from 0) of the train split"),
    ],
)
def test_what_is_no_text_is_refused(value: Any, words: str) -> None:
    task = Task.from_rows([{"text": value, "label": "pos"}], **FIELDS)
    assert words in problem_of(lambda: task.rows("train"))


def test_categories_of_pandas_are_texts(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["b", "a"], "label": ["pos", "neg"]}).astype("category")
    frame.to_parquet(tmp_path / "d.parquet")
    write_json(tmp_path / "task.json", {**FIELDS, "data": {"train": "d.parquet"}})
    rows, labels = open_task(tmp_path).rows("train")
    assert (list(rows["text"]), labels) == (["b", "a"], [1, 0])


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, {"b"}, b"\xff", None])
@pytest.mark.parametrize("source", ["{{ x }}", "{{ y[0] }}!"])
def test_a_template_refuses_what_has_no_text(value: Any, source: str) -> None:
    with pytest.raises(PimergeError, match="cannot be filled in: a value in it is"):
        Template("prompt", source).text({"x": value, "y": [value]})


def test_items_of_an_answer_are_texts() -> None:
    template = Template("answer", "{{ x }}")
    assert template.values({"x": ["a", 1]}) == ["a", "1"]
    with pytest.raises(PimergeError, match="a value in it is an object"):
        template.values({"x": ["a", {"b": 1}]})


def test_bytes_in_a_template_are_utf8() -> None:
    from pimerge.tasks.examples import Rows
    from pimerge.tasks.types._templates import reader

    table = Dataset.from_dict({"x": ["café".encode()]})
    assert reader(Rows(table, {}, [0], [0], "the rows"), ["x"])(0) == {"x": "café"}
