"""A small text task in files of several formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pimerge.core.errors import PimergeError
from tests.support.tasks import write_json

TEXTS = ["a cat", "the dog runs", "a bird", "cat on mat", 'dog, "quoted']
LABELS = [1, 0, 1, 1, 0]
NAMES = ["dog", "cat"]
Rows = Sequence[dict[str, Any]]


def write_parquet(path: Path, rows: Rows) -> None:
    Dataset.from_list(list(rows)).to_parquet(str(path))


def write_table(separator: str) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            quoting: Any = {"quoting": csv.QUOTE_NONE, "quotechar": None} if separator == "\t" else {}
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, **quoting)
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
