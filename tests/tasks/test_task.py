"""``task.json`` → rows, labels and draws, against the rows that the tests wrote themselves."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from pimerge.core.errors import PimergeError
from pimerge.tasks.sampling import sample_shots
from pimerge.tasks.task import Task, open_task
from tests.support.tasks import write_json

TEXTS = ["a cat", "the dog runs", "a bird", "cat on mat", "dog, \tquoted"]
LABELS = [1, 0, 1, 1, 0]
NAMES = ["dog", "cat"]
Rows = Sequence[dict[str, Any]]


def write_parquet(path: Path, rows: Rows) -> None:
    Dataset.from_list(list(rows)).to_parquet(str(path))


def write_table(separator: str) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)

    return write


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "parquet": write_parquet,
    "csv": write_table(","),
    "tsv": write_table("\t"),
    "json": lambda path, rows: write_json(path, list(rows)),
    "jsonl": write_lines,
}


def text_rows(labels: Sequence[Any] = LABELS) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]


def make_task(folder: Path, rows: Rows | None = None, **fields: Any) -> Path:
    """A text task with one split ``train`` as JSON lines; fields replace those of its task.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows is None or rows:
        write_lines(folder / "train.jsonl", text_rows() if rows is None else rows)
    document = {"type": "text-classification", "data": {"train": "train.jsonl"}, "labels": NAMES} | fields
    write_json(folder / "task.json", document)
    return folder


def problem_of(action: Callable[[], object]) -> str:
    with pytest.raises(PimergeError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_and_labels_are_the_same_in_every_format(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"train.{ending}", text_rows())
    task = open_task(make_task(tmp_path, [], data={"train": f"train.{ending}"}))
    rows, labels = task.rows("train")
    assert list(rows["text"]) == TEXTS
    assert labels == LABELS


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
def test_labels_that_nobody_names_are_asked_for(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
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


def test_one_file_may_serve_two_splits_by_slices(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, splits={"train": "train[:3]", "test": "train[3:]"}, data="train.jsonl"))
    assert list(task.rows("train")[0]["text"]) == TEXTS[:3]
    assert list(task.rows("test")[0]["text"]) == TEXTS[3:]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"sentence": row["text"], "y": row["label"]} for row in text_rows()]
    task = open_task(make_task(tmp_path, rows, columns={"text": "sentence", "label": "y"}))
    assert task.rows("train")[1] == LABELS


def test_every_unknown_label_is_counted(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, text_rows(["cat", "wolf", "wolf", "emu", "dog"])))
    message = problem_of(lambda: task.rows("train"))
    assert "'wolf' (2 rows: 1, 2, from 0)" in message
    assert "'emu' (1 rows: 3, from 0)" in message
    assert "dog, cat" in message


@pytest.mark.parametrize("label", [2, -1, None, [0, 1]])
def test_a_label_that_is_no_class_is_named(tmp_path: Path, label: Any) -> None:
    rows = [{"text": "a", "label": label}, {"text": "b", "label": label}]
    task = open_task(make_task(tmp_path, rows))
    assert f"unknown labels: {label} (2 rows: 0, 1, from 0)" in problem_of(lambda: task.rows("train"))


@pytest.mark.parametrize("text", [None, 3.5])
def test_a_row_without_a_text_is_named(tmp_path: Path, text: Any) -> None:
    task = open_task(make_task(tmp_path, [{"text": text, "label": 0}]))
    if text is None:
        assert "no text in 1 row: 0 (from 0)" in problem_of(lambda: task.rows("train"))
    else:
        assert task.rows("train")[1] == [0]


def test_texts_and_labels_that_are_wrong_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, *({"text": None, "label": 9} for _ in range(6))]
    message = problem_of(lambda: open_task(make_task(tmp_path, rows)).rows("train"))
    assert "no text in 6 rows: 1, 2, 3, 4, 5 … (from 0)" in message
    assert "unknown labels: 9 (6 rows: 1, 2, 3, 4, 5 …, from 0)" in message


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": Value("int64")})
    Dataset.from_dict({"text": [], "label": []}, features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert f"the split 'train' of '{task.path}' is empty" in problem_of(lambda: task.rows("train"))


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, splits={"train": "train[5:]"}))
    assert "is empty" in problem_of(lambda: task.rows("train"))


def test_a_missing_column_suggests_the_nearest(tmp_path: Path) -> None:
    task = open_task(make_task(tmp_path, columns={"text": "txt", "label": "lable"}))
    message = problem_of(lambda: task.rows("train"))
    assert "no column 'txt' for the text" in message
    assert "did you mean 'text'?" in message
    assert "no column 'lable' for the label" in message
    assert "did you mean 'label'?" in message


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


def test_files_of_several_formats_are_refused(tmp_path: Path) -> None:
    write_table(",")(tmp_path / "test.csv", text_rows())
    task = open_task(make_task(tmp_path, data={"train": "train.jsonl", "test": "test.csv"}))
    assert "mixes .csv, .jsonl" in problem_of(lambda: task.rows("train"))


def test_comma_and_tab_separated_files_do_not_mix(tmp_path: Path) -> None:
    write_table(",")(tmp_path / "train.csv", text_rows())
    write_table("\t")(tmp_path / "test.tsv", text_rows())
    task = open_task(make_task(tmp_path, data={"train": "train.csv", "test": "test.tsv"}))
    assert "mixes .csv, .tsv" in problem_of(lambda: task.rows("train"))


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xls").write_bytes(b"")
    task = open_task(make_task(tmp_path, data={"train": "train.xls"}))
    assert "'train.xls' ends in '.xls'" in problem_of(lambda: task.rows("train"))


def test_a_broken_file_is_named_with_its_task(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    task = open_task(make_task(tmp_path, [], data={"train": "train.parquet"}))
    assert f"the split 'train' of '{tmp_path / 'task.json'}' cannot be read" in problem_of(lambda: task.rows("train"))


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
def test_a_task_file_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
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


def test_a_limit_draws_so_many_by_seed_and_keeps_the_order(text_task: Path, bert_base: Path) -> None:
    task = open_task(text_task)
    every, _ = examples_of(task, bert_base)
    few, _ = examples_of(task, bert_base, limit=7, seed=1)
    places = [every.index(ids) for ids in few]
    assert len(few) == 7
    assert places == sorted(places)
    assert few == examples_of(task, bert_base, limit=7, seed=1)[0]
    assert few != examples_of(task, bert_base, limit=7, seed=2)[0]
    assert examples_of(task, bert_base, limit=1000)[0] == every


def test_shots_of_a_task_are_those_drawn_from_its_labels(text_task: Path, bert_base: Path) -> None:
    task = open_task(text_task)
    every, labels = examples_of(task, bert_base)
    drawn, _ = examples_of(task, bert_base, shots=3, seed=4)
    assert drawn == [every[index] for index in sample_shots(labels, 3, 4, task.labels)]
