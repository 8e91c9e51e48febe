"""Images that a data file names by their paths, against the same images in parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pimerge.core.errors import PimergeError
from pimerge.tasks.task import open_task
from pimerge.tasks.types import image_classification, image_text_to_text
from tests.support.bases import model_for
from tests.support.tasks import write_image_task, write_image_text_task, write_json

Scans = tuple[list[Any], list[int]]
COUNT = 6


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            return
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def named(tmp_path: Path, scans: Scans) -> Callable[..., Path]:
    """A task about whether a digit is even, whose data file names the first scans; fields replace its own."""

    def make(file: str = "data/train.jsonl", absolute: bool = False, **fields: Any) -> Path:
        folder = tmp_path / "named"
        pictures = (folder / file).parent / "pictures"
        pictures.mkdir(parents=True)
        rows = []
        for place in range(COUNT):
            scans[0][place].save(pictures / f"{place}.png")
            path = pictures.resolve() / f"{place}.png" if absolute else Path("pictures") / f"{place}.png"
            rows.append({"image": str(path), "label": scans[1][place] % 2, "words": "the cat"})
        write_rows(folder / file, rows)
        document = {"type": "image-classification", "data": {"train": file}, "labels": ["even", "odd"], **fields}
        write_json(folder / "task.json", document)
        return folder

    return make


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("file", ["data/train.jsonl", "train.csv"])
def test_classes_of_images_are_those_of_parquet(
    vit_base: Path, scans: Scans, named: Callable[..., Path], tmp_path: Path, file: str, absolute: bool
) -> None:
    folder = named(file, absolute)
    inside = write_image_task(tmp_path / "parquet", scans[0], [digit % 2 for digit in scans[1]], ["even", "odd"])
    processor, config = image_classification.load_processor(str(vit_base), None), AutoConfig.from_pretrained(vit_base)
    found, labels = open_task(folder).examples("train", processor, config)
    expected, known = open_task(inside).examples("train", processor, config)
    assert labels == known[:COUNT]
    for place in range(COUNT):
        assert torch.equal(found[place]["pixel_values"], expected[place]["pixel_values"])


def test_answers_about_images_are_those_of_parquet(
    image_text_base: Callable[[str], Path], scans: Scans, named: Callable[..., Path], tmp_path: Path
) -> None:
    base = image_text_base("florence2")
    processor, config = image_text_to_text.load_processor(str(base), None), model_for(base).config
    fields = {"type": "image-text-to-text", "prompt": "{{ words }}", "columns": {"image": "image"}}
    found, _ = open_task(named(**fields)).examples("train", processor, config)
    inside = write_image_text_task(tmp_path / "parquet", scans, prompt="the cat", labels=["even", "odd"])
    expected, _ = open_task(inside).examples("train", processor, config)
    for place in range(COUNT):
        assert all(torch.equal(found[place][name], value) for name, value in expected[place].items())


@pytest.mark.parametrize("kind", ["image-classification", "image-text-to-text"])
def test_every_row_with_a_bad_image_is_told_at_once(
    vit_base: Path, image_text_base: Callable[[str], Path], named: Callable[..., Path], kind: str
) -> None:
    fields = {"prompt": "?"} if kind == "image-text-to-text" else {}
    base = image_text_base("florence2") if fields else vit_base
    folder = named(type=kind, columns={"image": "image"}, **fields)
    pictures = folder / "data" / "pictures"
    (pictures / "1.png").unlink()
    (pictures / "2.png").write_bytes(b"GIF89 no image")
    (pictures / "4.png").write_bytes((pictures / "4.png").read_bytes()[:60])
    task = open_task(folder)
    with pytest.raises(PimergeError) as caught:
        task.examples("train", task.type.load_processor(str(base), None), model_for(base).config)
    first, second, third = caught.value.problems
    assert "row 1 (from 0) of the train split" in first.message
    assert f"there is no image '{pictures / '1.png'}'" in first.message
    assert first.hint == "paths are relative to the data file: fix it or leave the row out"
    assert "row 2 (from 0)" in second.message
    assert "cannot be decoded: cannot identify image file" in second.message
    assert "row 4 (from 0)" in third.message
    assert "cannot be decoded" in third.message


def test_rows_without_a_path_are_told(named: Callable[..., Path]) -> None:
    folder = named()
    file = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["image"] = None
    write_rows(file, rows)
    with pytest.raises(PimergeError, match=r"no image in 1 row: 3 \(from 0\)"):
        open_task(folder).rows("train")


def test_relative_paths_need_one_folder(named: Callable[..., Path]) -> None:
    folder = named(data={"train": ["data/train.jsonl", "more/train.jsonl"]})
    lines = (folder / "data" / "train.jsonl").read_text()
    (folder / "more").mkdir()
    (folder / "more" / "train.jsonl").write_text(lines)
    with pytest.raises(PimergeError, match=r"in 12 rows \(0, 1, 2, 3, 4 ….*which lie in 2 folders"):
        open_task(folder).rows("train")


def test_another_image_is_another_task(named: Callable[..., Path], scans: Scans) -> None:
    folder = named()
    before = open_task(folder).sha256()
    assert open_task(folder).sha256() == before
    scans[0][50].save(folder / "data" / "pictures" / "2.png")
    assert open_task(folder).sha256() != before


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_images_in_parquet_without_the_marks_of_datasets(tmp_path: Path, scans: Scans, form: str) -> None:
    import io

    import pandas

    held = []
    for image in scans[0][:3]:
        file = io.BytesIO()
        image.save(file, "png")
        held.append(file.getvalue() if form == "bytes" else {"bytes": file.getvalue(), "path": None})
    pandas.DataFrame({"image": held, "label": [0, 1, 0]}).to_parquet(tmp_path / "d.parquet")
    fields = {"type": "image-classification", "data": {"train": "d.parquet"}, "labels": ["a", "b"]}
    write_json(tmp_path / "task.json", fields)
    rows, labels = open_task(tmp_path).rows("train")
    assert labels == [0, 1, 0]
    assert [image.tobytes() for image in rows["image"]] == [image.tobytes() for image in scans[0][:3]]
