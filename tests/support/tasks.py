"""Task folders: images, texts, texts about images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from tests.support.bases import WORDS


def write_image_text_task(folder: Path, scans: tuple[list[Any], list[int]], count: int = 12, **fields: Any) -> Path:
    """A task about scans: whether the digit is even; fields replace those of task.json.

    The columns are ``scan``, ``words`` (none to three), ``name`` of the digit, ``parity``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = Features(scan=Image(), words=Value("string"), name=Value("string"), parity=Value("int64"))
    images, digits = scans
    for start, split in ((0, "train"), (100, "test")):
        part = range(start, start + count)
        rows = {
            "scan": [images[i] for i in part],
            "words": [" ".join(WORDS[i % 7 : i % 7 + i % 4]) for i in part],
            "name": [WORDS[digits[i]] for i in part],
            "parity": [digits[i] % 2 for i in part],
        }
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    document = {
        "type": "image-text-to-text",
        "data": {"train": "train.parquet", "test": "test.parquet"},
        "columns": {"image": "scan", "label": "parity"},
        "labels": ["dog", "cat"],
        "prompt": "the {{ words }}:",
        **fields,
    }
    write_json(folder / "task.json", {name: value for name, value in document.items() if value is not None})
    return folder


def write_text_task(folder: Path, base: str, count: int = 12, **fields: Any) -> Path:
    """A task for a language model of that name: which of two animals a row names; fields replace those of task.json."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for split in ("train", "test"):
        rows = []
        for index in range(count):
            words = [WORDS[i] for i in torch.randint(4, len(WORDS), (index % 5,), generator=generator).tolist()]
            rows.append(
                {"words": " ".join(["cat" if index % 2 else "dog", *words]), "animal": index % 2, "colour": "red"}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "type": "seq2seq" if base in ("t5", "bart") else "causal-lm",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "columns": {"label": "animal"},
        "labels": ["dog", "cat"],
        "prompt": "the {{ words }}:",
        **fields,
    }
    write_json(folder / "task.json", {name: value for name, value in document.items() if value is not None})
    return folder


@pytest.fixture(scope="session")
def scans() -> tuple[list[Any], list[int]]:
    """200 real scans of digits as 16 × 16 PIL images, and what they show."""
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        PILImage.fromarray((pixels * 15).astype("uint8")).resize((16, 16), PILImage.Resampling.BICUBIC)
        for pixels in digits.images[:200]
    ]
    return images, [int(digit) for digit in digits.target[:200]]


def write_image_task(folder: Path, images: Sequence[Any], labels: Sequence[int], names: Sequence[str]) -> Path:
    """A task folder with parquet files: the last quarter is the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(images) * 3 // 4
    features = Features({"image": Image(), "label": Value("int64")})
    for split, part in (("train", slice(0, cut)), ("test", slice(cut, None))):
        rows = {"image": list(images[part]), "label": list(labels[part])}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    write_json(
        folder / "task.json",
        {
            "type": "image-classification",
            "data": {"train": "train.parquet", "test": "test.parquet"},
            "labels": list(names),
        },
    )
    return folder


@pytest.fixture(scope="session")
def parity_task(tmp_path_factory: pytest.TempPathFactory, scans: tuple[list[Any], list[int]]) -> Path:
    """Even or odd: an image task on real scans."""
    images, digits = scans
    folder = tmp_path_factory.mktemp("tasks") / "parity"
    return write_image_task(folder, images, [digit % 2 for digit in digits], ["even", "odd"])


@pytest.fixture(scope="session")
def text_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cat or dog: a text task as JSON lines, with texts of 2 to 12 words."""
    folder = tmp_path_factory.mktemp("tasks") / "pets"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for index in range(count):
            length = 1 + index % 11
            words = [WORDS[i] for i in torch.randint(4, len(WORDS), (length,), generator=generator).tolist()]
            rows.append({"text": " ".join(["cat" if index % 2 else "dog", *words]), "label": index % 2})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(
        folder / "task.json",
        {
            "type": "text-classification",
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "labels": ["dog", "cat"],
        },
    )
    return folder


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file of a test."""
    path.write_text(json.dumps(document, indent=1))
