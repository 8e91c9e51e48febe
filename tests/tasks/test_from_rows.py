"""Tasks of rows in memory, against the same rows in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from pimerge.core.errors import PimergeError
from pimerge.tasks.task import Task, open_task
from tests.support.tasks import write_json

ROWS = [
    {"text": "a cat", "label": "cat"},
    {"text": "the dog runs", "label": "dog"},
    {"text": "a bird", "label": "cat"},
    {"text": "cat on mat", "label": "dog"},
]
NUMBERED = Dataset.from_dict(
    {"sentence": [row["text"] for row in ROWS], "label": [1, 0, 1, 0]},
    features=Features({"sentence": Value("string"), "label": ClassLabel(names=["dog", "cat"])}),
)


def encoded(task: Task, role: str, base: Path, **options: Any) -> list[tuple[list[int], int]]:
    from transformers import AutoConfig

    processor = task.type.load_processor(str(base), None)
    examples, _ = task.examples(role, processor, AutoConfig.from_pretrained(base), **options)
    return [(examples[i]["input_ids"].tolist(), int(examples[i]["labels"])) for i in range(len(examples))]


@pytest.mark.parametrize("options", [{}, {"shots": 1, "seed": 3}, {"limit": 2, "seed": 1}])
def test_examples_are_those_of_the_same_rows_in_a_file(
    tmp_path: Path, bert_base: Path, options: dict[str, Any]
) -> None:
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    fields = {"type": "text-classification", "data": {"train": "rows.parquet"}, "labels": ["cat", "dog"]}
    write_json(tmp_path / "task.json", fields)
    in_file = encoded(open_task(tmp_path), "train", bert_base, **options)
    assert encoded(Task.from_rows(ROWS), "train", bert_base, **options) == in_file


@pytest.mark.parametrize(
    ("rows", "kind", "labels", "columns"),
    [
        (ROWS, "text-classification", ["cat", "dog"], {"text": "text", "label": "label"}),
        (NUMBERED, "text-classification", ["dog", "cat"], {"text": "sentence", "label": "label"}),
        (
            [{"tokens": ["a", "b"], "ner_tags": ["O", "X"]}],
            "token-classification",
            ["O", "X"],
            {"tokens": "tokens", "labels": "ner_tags"},
        ),
        (
            [{"question": "?", "choices": ["a", "b"], "answer": 0}],
            "multiple-choice",
            [],
            {"question": "question", "choices": "choices", "answer": "answer"},
        ),
    ],
)
def test_type_labels_and_columns_are_inferred(rows: Any, kind: str, labels: list[str], columns: dict[str, str]) -> None:
    task = open_task(rows)
    assert (task.file.type, task.labels, task.columns, task.name) == (kind, labels, columns, "target")
    assert task.rows("train")[1] == {"dog": [1, 0, 1, 0], "cat": [0, 1, 0, 1]}.get("".join(labels[:1]), [0])


def image_rows(folder: Path, images: Sequence[Any], prefix: str = "") -> list[dict[str, str]]:
    folder.mkdir(exist_ok=True)
    rows = []
    for index, image in enumerate(images):
        path = folder / f"{prefix}{index}.png"
        image.save(path)
        rows.append({"image": str(path), "label": "even" if index % 2 else "odd"})
    return rows


def test_images_may_be_pictures_or_paths(tmp_path: Path, scans: tuple[list[Any], list[int]]) -> None:
    images = scans[0][:3]
    rows = image_rows(tmp_path, images)
    tasks = [
        Task.from_rows(rows),
        Task.from_rows([{**row, "image": image} for row, image in zip(rows, images, strict=True)]),
    ]
    for task in tasks:
        assert task.file.type == "image-classification"
        assert [image.tobytes() for image in task.rows("train")[0]["image"]] == [image.tobytes() for image in images]


def test_an_image_counts_by_its_bytes_and_not_by_its_path(tmp_path: Path, scans: tuple[list[Any], list[int]]) -> None:
    rows = image_rows(tmp_path, scans[0][:3])
    whole = Task.from_rows(rows).sha256()
    assert Task.from_rows(image_rows(tmp_path / "elsewhere", scans[0][:3], "other-")).sha256() == whole
    assert Task.from_rows(image_rows(tmp_path / "changed", scans[0][1:4])).sha256() != whole
    held = [{**row, "image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
    assert Task.from_rows(Dataset.from_list(held).cast_column("image", Image())).sha256() == whole


@pytest.mark.parametrize(
    ("split", "texts"),
    [("train[:50%]", ["a cat", "the dog runs"]), ("train[3:]+test", ["cat on mat", "a cat"])],
)
def test_a_split_may_be_a_part_of_the_rows(split: str, texts: list[str]) -> None:
    task = Task.from_rows(
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])), splits={"test": split}
    )
    assert list(task.rows("test")[0]["text"]) == texts


def test_rows_that_were_selected_keep_their_own_cells() -> None:
    rows = Dataset.from_list([{"text": None, "label": "cat"}, *ROWS, {"text": None, "label": "dog"}])
    assert list(Task.from_rows(rows.select(range(1, 5))).rows("train")[0]["text"]) == [row["text"] for row in ROWS]
    with pytest.raises(PimergeError, match=r"no text in 1 row: 1 \(from 0\)"):
        Task.from_rows(rows.select([3, 5])).rows("train")


def test_the_hash_is_of_the_rows_and_their_meaning() -> None:
    whole = Task.from_rows(ROWS).sha256()
    assert Task.from_rows(Dataset.from_list([*ROWS, *ROWS]).select(range(4)), name="other").sha256() == whole
    others = [
        Task.from_rows(ROWS[::-1]),
        Task.from_rows(ROWS, labels=["dog", "cat"]),
        Task.from_rows(ROWS, test=ROWS),
        Task.from_rows([{**row, "more": 1} for row in ROWS]),
        Task.from_rows(NUMBERED),
        Task.from_rows(NUMBERED.cast_column("label", ClassLabel(names=["cat", "dog"])), labels=["dog", "cat"]),
    ]
    assert len({whole, *(task.sha256() for task in others)}) == 7


def test_the_document_beside_an_output_is_the_same_task_without_its_rows(tmp_path: Path) -> None:
    task = Task.from_rows(NUMBERED, name="pets")
    document = task.document_for(tmp_path)
    assert document == {
        "type": "text-classification",
        "splits": {},
        "columns": {"text": "sentence"},
        "labels": ["dog", "cat"],
        "rows": task.data.content(),
    }
    write_json(tmp_path / "task.json", document)
    again = open_task(tmp_path)
    assert again.labels == task.labels
    assert again.sha256() == task.sha256() != Task.from_rows(NUMBERED.select([0, 1])).sha256()
    assert again.document_for(tmp_path / "deeper") == document
    assert not again.has_split("train")
    with pytest.raises(PimergeError, match="names no data, so there are no rows to read"):
        again.rows("train")


def test_splits_are_had_if_there_are_rows() -> None:
    task = Task.from_rows({"train": ROWS, "unlabelled": [{"text": "what?"}]})
    assert (task.has_split("unlabelled"), task.has_split("test")) == (True, False)
    assert task.rows("unlabelled")[1] == [0]
    with pytest.raises(PimergeError, match="the rows of 'target': there is no split 'test'"):
        task.rows("test")


def test_free_answers_need_no_labels() -> None:
    rows = [{"question": "2+2", "reply": "4"}]
    task = Task.from_rows(rows, type="seq2seq", prompt="{{ question }}", answer="{{ reply }}")
    assert (task.labels, task.metrics) == ([], ["exact-match"])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the rows of the split 'train' are empty"),
        ("rows.jsonl", {}, "the rows of the split 'train' are a str"),
        ({}, {}, "there are no rows"),
        ([{"text": "a"}, {"text": 1}], {}, "the rows of the split 'train' do not make a table"),
        ([{"words": "a", "y": 1}], {}, "the columns words, y do not determine the type of task"),
        ([{"text": "a", "image": "a.png", "label": "a"}], {}, "fit several types of task: image-classification, text-"),
        ([{"text": "a", "y": "b"}], {"type": "text-classification"}, "the rows have no column 'label' for the label"),
        ([{"text": "a", "label": 1}], {}, "the labels in the column 'label' are not names"),
        ([{"text": "a", "label": "b"}], {}, "all labels in the column 'label' are 'b'"),
        (ROWS, {"type": "text-clasification"}, "did you mean 'text-classification'?"),
        (ROWS, {"prompt": "?"}, "the task 'target': the type 'text-classification' has no field 'prompt'"),
        (ROWS, {"lables": ["a"]}, "the task 'target': lables: Extra inputs"),
        (ROWS, {"data": "rows.csv"}, "the task 'target' has rows in memory, and data"),
    ],
)
def test_what_is_missing_is_said(rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PimergeError) as caught:
        Task.from_rows(rows, **options)
    assert message in str(caught.value)


def test_a_row_is_named_by_its_number(bert_base: Path) -> None:
    task = Task.from_rows(ROWS, test=[*ROWS, {"text": "a wolf", "label": "wolf"}], labels=["cat", "dog"])
    with pytest.raises(PimergeError, match=r"the test split 'test' of 'target' has unknown labels: 'wolf' \(1 row: 4"):
        encoded(task, "test", bert_base)


def test_an_opened_task_is_not_opened_again() -> None:
    task = Task.from_rows(ROWS)
    assert open_task(task) is task
