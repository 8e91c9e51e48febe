"""Bad rows of several sorts in one file: all are told at once, whichever stage finds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pimerge.core.errors import PimergeError, Problem
from pimerge.tasks.row_errors import RowsError
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.tasks import write_json

Rows = list[dict[str, Any]]
LONG = "cat " * 60


def written(folder: Path, rows: Rows, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "task.json", {"data": {"train": "train.jsonl"}, **fields})
    return folder


def problems_of(folder: Path, base: Path, **draw: Any) -> tuple[str, list[str]]:
    """What is said of all, and each problem."""
    task = open_task(folder)
    config = model_for(base).config
    with pytest.raises(PimergeError) as caught:
        task.examples("train", task.type.load_processor(str(base), None), config, **draw)
    return caught.value.heading, [problem.message for problem in caught.value.problems]


def require(found: list[str], *expected: tuple[str, str]) -> None:
    assert len(found) == len(expected), found
    for message, (row, words) in zip(found, expected, strict=True):
        assert row in message
        assert words in message


@pytest.mark.parametrize("name", ["t5", "llama-lm"])
def test_an_empty_answer_and_one_that_is_too_long(
    language_base: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    rows = [{"q": "the cat", "a": "dog"} for _ in range(9)]
    rows[1]["a"], rows[2]["a"], rows[3]["q"], rows[5]["q"] = "", LONG, None, " "
    kind = "seq2seq" if name == "t5" else "causal-lm"
    folder = written(tmp_path / "task", rows, type=kind, prompt="{{ q }}", answer="{{ a }}")
    heading, found = problems_of(folder, language_base(name))
    assert heading.startswith("4 problems in the train split")
    expected = [("row 1 ", "is empty"), ("row 2 ", "has 61 tokens"), ("row 3 ", "null"), ("row 5 ", "prompt is empty")]
    require(found, *expected)
    assert problems_of(folder, language_base(name), limit=8)[1] == found


def test_one_row_may_have_two_problems(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = written(tmp_path / "task", [{"q": "", "a": ""}], type="seq2seq", prompt="{{ q }}", answer="{{ a }}")
    _, found = problems_of(folder, language_base("t5"))
    require(found, ("row 0 ", "the prompt is empty"), ("row 0 ", "the answer is empty"))


def test_a_missing_column_and_a_bad_row(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"q": "the cat", "label": label} for label in ("a", "b", "c")]
    labels = {"labels": ["a", "b"], "verbalizer": {"a": "cat", "b": "dog"}}
    folder = written(tmp_path / "task", rows, type="seq2seq", prompt="{{ question }}", **labels)
    _, found = problems_of(folder, language_base("t5"))
    require(found, ("", "no column 'question', which a template names"), ("2, from 0", "unknown labels: 'c'"))


def test_choices_that_are_none(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    rows: Rows = [{"question": "the cat?", "choices": ["a", "cat", "b"], "answer": 1} for _ in range(8)]
    rows[1]["answer"], rows[2]["choices"], rows[3]["choices"] = 3, ["a"], ["a", "", "b"]
    rows[4]["question"], rows[6]["choices"] = None, [LONG, "b"]
    folder = written(tmp_path / "task", rows, type="multiple-choice")
    _, found = problems_of(folder, language_base("gpt2-lm"))
    expected = [("row 1 ", "the answer is 3"), ("row 2 ", "the choices are ['a']"), ("row 3 ", "a choice is empty")]
    require(found, *expected, ("4 (from 0)", "no question in 1 row"), ("row 6 ", "has 61 tokens"))


def test_words_and_their_classes(bert_base: Path, tmp_path: Path) -> None:
    rows: Rows = [{"tokens": ["the", "cat"], "labels": ["O", "A"]} for _ in range(6)]
    rows[1]["labels"], rows[2]["labels"], rows[4]["tokens"] = ["O"], ["O", "B"], None
    folder = written(tmp_path / "task", rows, type="token-classification", labels=["O", "A"])
    _, found = problems_of(folder, bert_base)
    require(found, ("row 1 ", "2 words and 1 labels"), ("2, from 0", "'B'"), ("4 (from 0)", "no tokens in 1 row"))


def test_images_labels_and_prompts(
    image_text_base: Callable[[str], Path], vit_base: Path, scans: tuple[list[Any], list[int]], tmp_path: Path
) -> None:
    labels = ["even", "odd"]
    rows = [{"image": f"{place}.png", "q": "the cat", "label": labels[place % 2]} for place in range(8)]
    folder = tmp_path / "task"
    folder.mkdir()
    for place in (0, 1, 4, 5, 6, 7):
        scans[0][place].save(folder / f"{place}.png")
    (folder / "2.png").write_text("no image")
    rows[4]["label"], rows[5]["image"] = "prime", ""
    same = [("row 2 ", "cannot be decoded"), ("row 3 ", "there is no image"), ("4, from 0", "'prime'")]
    same.append(("row 5 ", "there is no image"))
    folder = written(folder, rows, type="image-classification", labels=labels)
    require(problems_of(folder, vit_base)[1], *same)
    rows[6]["q"] = None
    fields = {"prompt": "{{ q }}", "columns": {"image": "image"}, "labels": labels}
    folder = written(folder, rows, type="image-text-to-text", **fields)
    _, found = problems_of(folder, image_text_base("florence2"))
    require(found, *same, ("row 6 ", "null"))


def test_of_many_problems_each_sort_is_told() -> None:
    told = [(row, Problem(f"row {row} is empty", "fill it")) for row in range(30)]
    error = RowsError("the train split", [*told, (29, Problem("row 29 is too long", "shorten it"))], range(30))
    shown = [problem.message for problem in error.problems]
    assert shown == [*(f"row {row} is empty" for row in range(4)), "row 29 is too long"]
    assert error.heading.startswith("31 problems in the train split (rows 0, 1, 2,")
    assert "19 …, from 0), including" in error.heading
