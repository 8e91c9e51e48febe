"""Folders of data files and of images, whatever their names contain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pimerge.tasks.task import open_task
from tests.support.tasks import write_json
from tests.support.text_rows import problem_of

NAMES = ["plain", "a[1]", "d*e", "what?", "g::h", "i#j%20", "k{b}", "two words (2)", "é", "~x", "-n", "$HOME"]
TEXT: dict[str, Any] = {"type": "text-classification", "labels": ["neg", "pos"]}


def write_csv(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"{text},pos\n" for text in texts))


def texts_of(folder: Path, role: str = "train") -> list[str]:
    return list(open_task(folder).rows(role)[0]["text"])


@pytest.mark.parametrize("name", NAMES)
def test_files_are_found_by_any_name(tmp_path: Path, name: str) -> None:
    write_csv(tmp_path / name / f"{name}.csv", "007")
    write_csv(tmp_path / name / "data" / "train.csv", "in the folder")
    write_json(tmp_path / name / "task.json", {**TEXT, "data": {"train": f"{name}.csv"}})
    assert texts_of(tmp_path / name) == ["007"]
    write_json(tmp_path / name / "task.json", {**TEXT, "data": "data"})
    assert texts_of(tmp_path / name) == ["in the folder"]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    write_csv(tmp_path / "t*.csv", "mine")
    write_csv(tmp_path / "tx.csv", "another")
    write_json(tmp_path / "task.json", {**TEXT, "data": "t*.csv"})
    assert texts_of(tmp_path) == ["mine"]
    (tmp_path / "t*.csv").unlink()
    assert "t*.csv" in problem_of(lambda: open_task(tmp_path).rows("train"))


def test_cells_in_a_folder_are_texts(tmp_path: Path) -> None:
    write_csv(tmp_path / "data" / "train.csv", "007", "NA")
    write_csv(tmp_path / "data" / "test.csv", "1.10")
    write_json(tmp_path / "task.json", {**TEXT, "data": "data"})
    assert texts_of(tmp_path) == ["007", "NA"]
    assert texts_of(tmp_path, "test") == ["1.10"]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.tsv"])
@pytest.mark.parametrize("data", [{"train": "data/train"}, "data"])
def test_a_replaced_file_of_the_same_time_is_read_again(tmp_path: Path, name: str, data: Any) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir()
    hashes = set()
    write_json(tmp_path / "task.json", {**TEXT, "data": data if data == "data" else {"train": f"data/{name}"}})
    for text in ("old", "new"):
        row = {"text": text, "label": "pos"}
        separator = "\t" if name.endswith("tsv") else ","
        path.write_text(
            json.dumps(row) if name.endswith("jsonl") else separator.join(row) + "\n" + separator.join(row.values())
        )
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(tmp_path) == [text]
        hashes.add(open_task(tmp_path).sha256())
    assert len(hashes) == 2


@pytest.mark.parametrize("top", ["images", "images [1]"])
def test_classes_of_images_are_their_folders(tmp_path: Path, top: str) -> None:
    for split in ("train", "test"):
        for grey, name in ((0, "a[1]"), (9, "b*")):
            path = tmp_path / top / split / name / "x?.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (2, 2), grey + (split == "test")).save(path)
    write_json(tmp_path / "task.json", {"type": "image-classification", "data": top})
    task = open_task(tmp_path)
    assert task.labels == ["a[1]", "b*"]
    for split, greys in (("train", [0, 9]), ("test", [1, 10])):
        rows, labels = task.rows(split)
        assert labels == [0, 1]
        assert [int(np.asarray(image).max()) for image in rows["image"]] == greys


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_classes_of_images_are_those_of_the_metadata(tmp_path: Path, name: str) -> None:
    rows = [{"file_name": "x.png", "label": "02"}, {"file_name": "sub/y.png", "label": "01"}]
    for row, grey in zip(rows, (3, 4), strict=True):
        path = tmp_path / "data" / "train" / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), grey).save(path)
    lines = (
        [json.dumps(row) for row in rows]
        if "json" in name
        else ["file_name,label", *(",".join(r.values()) for r in rows)]
    )
    (tmp_path / "data" / "train" / name).write_text("\n".join(lines))
    write_json(tmp_path / "task.json", {"type": "image-classification", "data": "data", "labels": ["01", "02"]})
    found, labels = open_task(tmp_path).rows("train")
    assert labels == [1, 0]
    assert [int(np.asarray(image).max()) for image in found["image"]] == [3, 4]


def test_nothing_is_written_into_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write_csv(tmp_path / "task" / "data" / "train.csv", "007")
    write_csv(tmp_path / "task" / "d.csv", "008")
    code = "import sys; from pimerge.tasks.task import open_task as t; print(t(sys.argv[1]).rows('train')[0].to_list())"
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("HF_")}
    for mode in (0o700, 0o500):
        home.chmod(mode)
        for data, text in (("data", "007"), ({"train": "d.csv"}, "008")):
            write_json(tmp_path / "task" / "task.json", {**TEXT, "data": data})
            command = [sys.executable, "-c", code, str(tmp_path / "task")]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert found.stdout.strip() == str([{"text": text, "label": "pos"}])
    assert not [path for path in home.rglob("*") if path.is_file()]
