"""``task.json`` → labels, examples and hashes, against the rows that the tests wrote themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from pimerge.tasks.sampling import sample_shots
from pimerge.tasks.task import Task, open_task
from tests.support.tasks import write_json
from tests.support.text_rows import (
    LABELS,
    NAMES,
    TEXTS,
    make_task,
    problem_of,
    text_rows,
    write_lines,
)


def test_labels_may_be_names_in_the_data(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, text_rows([NAMES[label] for label in LABELS])))
    assert task.rows("train")[1] == LABELS


def test_a_class_label_feature_goes_by_its_names_not_by_its_numbers(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    flipped = text_rows([1 - label for label in LABELS])
    Dataset.from_list(flipped, features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert task.rows("train")[1] == LABELS


def test_a_class_label_feature_with_other_names_goes_by_its_numbers(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["LABEL_0", "LABEL_1"])})
    Dataset.from_list(text_rows(), features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert task.rows("train")[1] == LABELS


def named_classes(path: Path, column: str = "label") -> None:
    """The texts with labels of a feature that names its classes."""
    features = Features({"text": Value("string"), column: ClassLabel(names=NAMES)})
    rows = [{"text": row["text"], column: row["label"]} for row in text_rows()]
    Dataset.from_list(rows, features=features).to_parquet(str(path))


def test_labels_that_are_left_out_are_those_of_the_data(tmp_path: Path) -> None:
    named_classes(tmp_path / "train.parquet", "kind")
    fields = {"data": {"train": "train.parquet"}, "columns": {"label": "kind"}}
    listed = open_task(make_task(tmp_path, [], **fields))
    left_out = open_task(make_task(tmp_path, [], labels=None, **fields))
    assert left_out.labels == NAMES
    assert left_out.rows("train")[1] == LABELS
    assert left_out.sha256() == listed.sha256()
    assert left_out.document_for(tmp_path)["labels"] == NAMES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no labels, and the column 'label' of its train split names no classes"),
        ({"columns": {"label": "lable"}}, "no column 'lable' for the label"),
        ({"data": {"train": "gone.jsonl"}}, "there is no data file"),
    ],
)
def test_missing_labels_without_names_in_the_data_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = make_task(tmp_path, labels=None, **fields)
    assert message in problem_of(lambda: open_task(folder))


def test_a_folder_like_a_repository_has_subsets(tmp_path: Path) -> None:
    repository = tmp_path / "org" / "pets"
    for subset in ("wild", "tame"):
        (repository / subset).mkdir(parents=True)
        named_classes(repository / subset / "train-00000-of-00001.parquet", subset)
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/train-*\n"
        for subset in ("wild", "tame")
    )
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    fields = {"data": "org/pets", "labels": None, "columns": {"label": "tame"}}
    assert open_task(make_task(tmp_path, [], subset="tame", **fields)).rows("train")[1] == LABELS
    assert "tame" in problem_of(lambda: open_task(make_task(tmp_path, [], subset="lame", **fields)))


@pytest.fixture
def image_folder(tmp_path: Path, scans: tuple[list[Any], list[int]]) -> Path:
    """data/train/{even,odd}/N.png, whose class names sort otherwise than the task's labels."""
    for index, (image, digit) in enumerate(zip(scans[0][:12], scans[1][:12], strict=True)):
        folder = tmp_path / "data" / "train" / ("odd" if digit % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:02}.png")
    write_json(tmp_path / "task.json", {"type": "image-classification", "data": "data", "labels": ["odd", "even"]})
    return tmp_path


def test_an_image_folder_goes_by_the_names_of_its_folders(
    image_folder: Path, scans: tuple[list[Any], list[int]]
) -> None:
    rows, labels = open_task(image_folder).rows("train")
    scan_of = {image.tobytes(): digit for image, digit in zip(scans[0][:12], scans[1][:12], strict=True)}
    assert labels == [1 - scan_of[image.tobytes()] % 2 for image in rows["image"]]


def test_an_image_moved_to_another_class_is_another_task(image_folder: Path) -> None:
    before = open_task(image_folder).sha256()
    train = image_folder / "data" / "train"
    last = max((train / "even").iterdir())
    last.rename(train / "odd" / "00.png")  # the files come in the same order as before
    assert open_task(image_folder).sha256() != before


def test_another_hub_data_set_is_another_task(tmp_path: Path) -> None:
    hashes = {
        open_task(make_task(tmp_path / name.replace("/", "-"), [], data=name)).sha256() for name in ("o/a", "o/b")
    }
    assert len(hashes) == 2


def test_swapped_splits_are_another_task(tmp_path: Path) -> None:
    make_task(tmp_path / "a", data={"train": "train.jsonl", "test": "other.jsonl"})
    make_task(tmp_path / "b", data={"test": "train.jsonl", "train": "other.jsonl"})
    for folder in ("a", "b"):
        write_lines(tmp_path / folder / "other.jsonl", text_rows()[:2])
    assert open_task(tmp_path / "a").sha256() != open_task(tmp_path / "b").sha256()


def test_changed_data_is_another_task_and_a_description_is_not(tmp_path: Path) -> None:
    first = open_task(make_task(tmp_path / "a")).sha256()
    assert open_task(make_task(tmp_path / "b", description="pets")).sha256() == first
    assert open_task(make_task(tmp_path / "c", text_rows([0, *LABELS[1:]]))).sha256() != first


@pytest.mark.parametrize("data", ["train.jsonl", {"train": "train.jsonl"}, {"train": ["train.jsonl"]}])
def test_a_document_for_another_folder_means_the_same_task(tmp_path: Path, data: Any) -> None:
    task = open_task(make_task(tmp_path / "here", data=data, description="pets"))
    there = tmp_path / "deep" / "there"
    there.mkdir(parents=True)
    write_json(there / "task.json", task.document_for(there))
    moved = open_task(there)
    assert moved.sha256() == task.sha256()
    assert list(moved.rows("train")[0]["text"]) == TEXTS


def test_all_problems_of_a_task_file_come_at_once(tmp_path: Path) -> None:
    make_task(tmp_path, type=3, labels=["one"], lables=["a", "b"])
    message = problem_of(lambda: open_task(tmp_path))
    for part in ("type: Input should be a valid string", "labels: ", "lables: ", "did you mean 'labels'?"):
        assert part in message


def test_all_unknown_roles_and_double_labels_come_at_once(tmp_path: Path) -> None:
    make_task(tmp_path, columns={"txt": "text"}, splits={"tets": "test"}, labels=["a", "a"])
    message = problem_of(lambda: open_task(tmp_path))
    assert "columns names the role 'txt'" in message
    assert "did you mean 'text'?" in message
    assert "splits names the role 'tets'" in message
    assert "did you mean 'test'?" in message
    assert "labels has a name twice" in message


def test_an_unknown_type_suggests_the_nearest(tmp_path: Path) -> None:
    make_task(tmp_path, type="text-clasification")
    assert "did you mean 'text-classification'?" in problem_of(lambda: open_task(tmp_path))


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_task_file_that_is_not_an_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "task.json").write_text(content)
    assert str(tmp_path / "task.json") in problem_of(lambda: open_task(tmp_path))


def test_a_folder_without_a_task_says_what_to_write(tmp_path: Path) -> None:
    assert f"there is no '{tmp_path / 'task.json'}'" in problem_of(lambda: open_task(tmp_path))


def examples_of(task: Task, base: Path, **options: Any) -> tuple[list[list[int]], list[int]]:
    """Token ids and labels of a task's training examples."""
    from transformers import AutoConfig

    processor = task.type.load_processor(str(base), None)
    examples, labels = task.examples("train", processor, AutoConfig.from_pretrained(base), **options)
    encoded = [examples[index] for index in range(len(examples))]
    assert [int(example["labels"]) for example in encoded] == labels
    return [example["input_ids"].tolist() for example in encoded], labels


def test_a_limit_samples_by_seed_and_keeps_the_order(text_task: Path, bert_base: Path) -> None:
    task = open_task(text_task)
    every, _ = examples_of(task, bert_base)
    few, _ = examples_of(task, bert_base, limit=7, seed=1)
    places = [every.index(ids) for ids in few]
    assert len(few) == 7
    assert places == sorted(places)
    assert few == examples_of(task, bert_base, limit=7, seed=1)[0]
    assert few != examples_of(task, bert_base, limit=7, seed=2)[0]
    assert examples_of(task, bert_base, limit=1000)[0] == every


def test_shots_of_a_task_are_sampled_by_its_labels(text_task: Path, bert_base: Path) -> None:
    task = open_task(text_task)
    every, labels = examples_of(task, bert_base)
    drawn, _ = examples_of(task, bert_base, shots=3, seed=4)
    assert drawn == [every[index] for index in sample_shots(labels, 3, 4, task.labels)]
