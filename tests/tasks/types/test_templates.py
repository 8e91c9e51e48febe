"""Templates of prompts and answers against the texts that they should give, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Rows
from pimerge.tasks.schema import TaskFile
from pimerge.tasks.task import open_task
from pimerge.tasks.types._templates import Template, Text, fill_in
from tests.support.tasks import write_json, write_text_task

ROWS = [{"q": "1 < 2 & so", "n": 2, "answers": ["a", "b"]}, {"q": "say 'x'", "n": 3, "answers": ["c"]}]


def rows_of(rows: list[dict[str, Any]], labels: list[int] | None = None) -> Rows:
    from datasets import Dataset

    numbers = [7 + index for index in range(len(rows))]
    return Rows(Dataset.from_list(rows), {}, labels or [0] * len(rows), numbers, "the train split")


def file_of(**fields: Any) -> TaskFile:
    return TaskFile(type="causal-lm", data="rows.jsonl", **fields)


def test_a_prompt_sees_every_column_as_it_is() -> None:
    found = fill_in(rows_of(ROWS), file_of(prompt="{{ q }} ({{ n + 1 }})\n", answer=" {{ n }} "))
    assert found == [Text("1 < 2 & so (3)\n", ("2",), 0, ("2",)), Text("say 'x' (4)\n", ("3",), 0, ("3",))]


def test_a_list_is_several_references_of_which_the_first_is_taught() -> None:
    found = fill_in(rows_of(ROWS), file_of(prompt="{{ q }}", answer="{{ answers }}"))
    assert [text.references for text in found] == [("a", "b"), ("c",)]
    assert [text.answers for text in found] == [("a",), ("c",)]
    nested = [{"q": "x", "answers": {"text": ["d", "e"]}}]
    assert fill_in(rows_of(nested), file_of(prompt="{{ q }}", answer="{{ answers.text }}"))[0].references == ("d", "e")
    assert fill_in(rows_of(ROWS), file_of(prompt="{{ q }}", answer="{{ answers[0] }}!"))[0].references == ("a!",)


def with_images(*content: bytes) -> Rows:
    """Rows with an image and a list of one."""
    from datasets import Dataset, Features, Image, List

    table = Dataset.from_dict(
        {"scan": [{"bytes": item} for item in content], "scans": [[{"bytes": item}] for item in content]},
        features=Features(scan=Image(), scans=List(Image())),
    )
    return Rows(table, {}, [0] * len(content), list(range(len(content))), "the train split")


def png(width: int, height: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    content = BytesIO()
    Image.new("L", (width, height)).save(content, "PNG")
    return content.getvalue()


def test_of_an_image_a_template_has_the_size_and_nothing_that_could_write_files(tmp_path: Path) -> None:
    rows = with_images(png(6, 4), png(2, 9))
    found = fill_in(rows, file_of(prompt="{{ scan.width }} × {{ scan.height }}", answer="{{ scans[0].width }}"))
    assert [(text.prompt, text.answers) for text in found] == [("6 × 4", ("6",)), ("2 × 9", ("2",))]
    for image in ("scan", "scans[0]"):
        with pytest.raises(PimergeError, match="no attribute 'save'"):
            fill_in(rows, file_of(prompt=f"{{{{ {image}.save('{tmp_path}/x.png') }}}}", answer="x"))
    assert not list(tmp_path.iterdir())


def test_the_row_of_an_image_that_is_broken_is_told() -> None:
    with pytest.raises(PimergeError, match=r"row 1 \(from 0\) of the train split: it cannot be read"):
        fill_in(with_images(png(2, 2), b"no image"), file_of(prompt="{{ scan.width }}", answer="x"))


def test_classes_answer_by_name_by_verbalizer_or_by_template() -> None:
    rows = rows_of(ROWS, [1, 0])
    named = fill_in(rows, file_of(prompt="{{ q }}", labels=["no", "yes"]))
    assert [(text.answers, text.right, text.references) for text in named] == [
        (("no", "yes"), 1, ("yes",)),
        (("no", "yes"), 0, ("no",)),
    ]
    worded = fill_in(
        rows, file_of(prompt="{{ q }}", labels=["no", "yes"], verbalizer={"no": "never", "yes": "of course"})
    )
    assert worded[0].answers == ("never", "of course")
    filled = fill_in(rows, file_of(prompt="{{ q }}", labels=["no", "yes"], answer="{{ label }} to {{ n }}"))
    assert [text.answers for text in filled] == [("no to 2", "yes to 2"), ("no to 3", "yes to 3")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{{ qq }}", "answer": "x"}, "has no column 'qq', which a template names\n  → did you mean 'q'?"),
        ({"prompt": "{{ q }}", "answer": "{{ reply }}"}, "no column 'reply'"),
        ({"prompt": "{{ q }}", "answer": "{{ q.nothing }}"}, "row 7 .*the answer cannot be filled in"),
        ({"prompt": "{{ q }}", "answer": "  "}, "row 7 .*the answer is empty"),
        ({"prompt": "{% if n == 2 %}{{ q }}{% endif %}", "answer": "x"}, "row 8 .*the prompt is empty"),
        ({"prompt": "{{ 1 / (n - 3) }}", "answer": "x"}, "row 8 .*division by zero"),
        ({"prompt": "{{ q.__class__.__mro__ }}", "answer": "x"}, "row 7 .*unsafe"),
        ({"prompt": "{{ answers.append(1) }}", "answer": "x"}, "row 7 .*"),
    ],
)
def test_what_a_row_does_not_give_is_told_with_the_row(fields: dict[str, str], message: str) -> None:
    with pytest.raises(PimergeError, match=message):
        fill_in(rows_of(ROWS), file_of(**fields))


def test_a_null_in_a_prompt_is_an_error() -> None:
    with pytest.raises(PimergeError, match=r"row 8 .*null"):
        fill_in(rows_of([{"q": "a"}, {"q": None}]), file_of(prompt="is {{ q }}", answer="x"))


def test_of_many_bad_rows_the_first_are_told_and_all_counted() -> None:
    with pytest.raises(PimergeError) as caught:
        fill_in(rows_of([{"q": ""}] * 40), file_of(prompt="{{ q }}", answer="x"))
    assert len(caught.value.problems) == 5
    assert "40 problems" in caught.value.heading


def test_nothing_in_a_template_is_random() -> None:
    with pytest.raises(PimergeError, match="random"):
        Template("prompt", "{{ words | random }}")


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"prompt": None}, ["there is no prompt"]),
        ({"prompt": "{{ words"}, ["prompt: line 1 of the template"]),
        ({"labels": None, "columns": {}}, ["neither labels nor an answer"]),
        ({"labels": None, "answer": "x", "columns": {}, "verbalizer": {}}, ["verbalizer chooses between classes"]),
        ({"labels": None, "answer": "x", "columns": {}, "scoring": "likelihood"}, ["scoring chooses between classes"]),
        ({"answer": "x"}, ["the answer is the same for all labels"]),
        ({"prompt": "{{ label }}"}, ["the prompt shows the label"]),
        ({"verbalizer": {"dog": "x"}}, ["no text for cat"]),
        ({"verbalizer": {"dog": "x", "cat": "x"}}, ["the same text"]),
        ({"verbalizer": {"dog": "x", "cat": " "}}, ["'cat' is empty"]),
        ({"verbalizer": {"dog": "x", "cat": "y", "catt": "z"}}, ["names the label 'catt'", "did you mean 'cat'"]),
        ({"answer": "{{ label }}", "verbalizer": {"dog": "x", "cat": "y"}}, ["both an answer and a verbalizer"]),
        ({"scoring": "guess"}, ["scoring"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
        ({"prompt": "{% if %}", "answer": "{{ }}", "labels": None}, ["prompt: line 1", "answer: line 1"]),
    ],
)
def test_a_task_file_that_does_not_fit_is_told_before_any_data(
    fields: dict[str, Any], messages: list[str], tmp_path: Path
) -> None:
    folder = write_text_task(tmp_path / "task", "gpt2-lm", **fields)
    if "verbalizer" in fields and fields["verbalizer"] == {}:
        document = json.loads((folder / "task.json").read_text())
        write_json(folder / "task.json", document | {"verbalizer": {}})
    with pytest.raises(PimergeError) as caught:
        open_task(folder)
    for message in messages:
        assert message in str(caught.value)


def test_a_field_of_another_type_is_an_error(text_task: Path, tmp_path: Path) -> None:
    document = json.loads((text_task / "task.json").read_text())
    write_json(tmp_path / "task.json", document | {"prompt": "{{ text }}", "chat": True})
    with pytest.raises(PimergeError) as caught:
        open_task(tmp_path)
    assert "the type 'text-classification' has no field 'prompt'" in str(caught.value)
    assert "the type 'text-classification' has no field 'chat'" in str(caught.value)
    with pytest.raises(PimergeError, match="the type 'seq2seq' has no field 'chat'"):
        open_task(write_text_task(tmp_path / "seq2seq", "t5", chat=True))
