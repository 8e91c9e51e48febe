"""The multimodal example: its data and pool match their description, its parts work, and its script prints a table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.multimodal import make
from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.tasks.task import open_task

MULTIMODAL = Path(make.__file__).parent
SPLITS = {"train": ["train"], "draws": ["few", "draws"], "test": ["test"]}


@pytest.fixture(scope="module")
def scans() -> dict[str, list[make.Row]]:
    return make.scan_rows()


@pytest.fixture(scope="module")
def data(scans: dict[str, list[make.Row]]) -> dict[str, list[make.Row]]:
    return make.data_of(scans)


def numbers(rows: Any) -> set[int]:
    """The numbers of the scans in some rows."""
    return {row["number"] for row in rows}


def test_answers_about_scans_are_right(scans: dict[str, list[make.Row]]) -> None:
    digits = load_digits()
    rows = [row for part in scans.values() for row in part]
    assert numbers(rows) == set(range(1797))
    loops = {"zero": 1, "six": 1, "eight": 2, "nine": 1}
    for row in rows:
        digit = int(digits.target[row["number"]])
        assert row["digit"] == make.in_words(digit)
        assert row["even"] == ("yes" if digit in (0, 2, 4, 6, 8) else "no")
        assert ["none", "one", "two"].index(row["loops"]) == loops.get(row["digit"], 0)
        assert row["caption"].split()[-1] == row["digit"]
        assert (row["claim"].split()[-1] == row["digit"]) == (row["fits"] == "yes")
        np.testing.assert_array_equal(np.asarray(row["image"]), np.round(digits.images[row["number"]] * 255 / 16))
    ink: dict[str, list[float]] = {"bold": [], "thin": []}
    for row in rows:
        ink[row["caption"].split()[1]].append(np.asarray(row["image"], float).sum())
    assert min(ink["bold"]) > max(ink["thin"])


def test_numbers_in_words_are_right(data: dict[str, list[make.Row]]) -> None:
    value = {make.in_words(number): number for number in range(1000)}
    assert len(value) == 1000
    assert value["nine hundred ninety nine"] == 999
    for row in data["sum.train.jsonl"] + data["sum.test.jsonl"]:
        assert value[row["first"]] + value[row["second"]] == value[row["sum"]]
    for row in data["more.train.jsonl"]:
        assert (value[row["first"]] > value[row["second"]]) == (row["more"] == "yes")
    for row in data["parity.draws.jsonl"]:
        assert (value[row["number"]] % 2 == 0) == (row["even"] == "yes") == (row["odd"] == "even")


def test_no_test_image_was_used_for_training(scans: dict[str, list[make.Row]], data: dict[str, list[make.Row]]) -> None:
    for name, rows in data.items():
        split = name.split(".")[-2]
        if name.endswith(".parquet"):
            assert numbers(rows) <= {number for part in SPLITS[split] for number in numbers(scans[part])}
        else:
            asked = [tuple(row.items()) for row in rows]
            others = [other for other in data if other.startswith(name.split(".")[0]) and other != name]
            assert len(set(asked)) == len(asked)
            assert not set(asked) & {tuple(row.items()) for other in others for row in data[other]}


def test_the_committed_data_is_what_make_writes(data: dict[str, list[make.Row]], tmp_path: Path) -> None:
    assert {file.name for file in (MULTIMODAL / "data").iterdir()} == set(data)
    for name, rows in data.items():
        make.write_rows(tmp_path / name, rows)
        if name.endswith(".jsonl"):
            assert (MULTIMODAL / "data" / name).read_bytes() == (tmp_path / name).read_bytes()
        else:
            assert pq.read_table(MULTIMODAL / "data" / name) == pq.read_table(tmp_path / name)
    specs = make.POOL | make.TARGETS
    assert {folder.name for folder in (MULTIMODAL / "tasks").iterdir()} == set(specs)
    for name, spec in specs.items():
        task = open_task(MULTIMODAL / "tasks" / name)
        assert task.file.prompt == spec.prompt
        assert task.labels == list(spec.labels)


def test_the_pool_is_complete_and_has_two_kinds() -> None:
    experts = [open_expert(folder) for folder in find_experts(MULTIMODAL / "experts")]
    assert {expert.name for expert in experts} == set(make.POOL) | {f"{task}-b" for task in make.TWINS}
    assert {expert.kind for expert in experts} == {"lora", "bottleneck"}
    for expert in experts:
        assert expert.kind == ("bottleneck" if expert.name.endswith("-b") else "lora")
        assert expert.base.folder == (MULTIMODAL / "base").resolve()


def test_everything_committed_is_below_4_mb() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z", str(MULTIMODAL)], capture_output=True, cwd=MULTIMODAL, check=False
    )
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    files = [MULTIMODAL / name for name in tracked.stdout.decode().split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.exists()) < 4 * 10**6


def test_the_base_recognises_digits_and_cannot_answer_questions(scans: dict[str, list[make.Row]]) -> None:
    processor = AutoProcessor.from_pretrained(MULTIMODAL / "base")
    model = AutoModelForImageTextToText.from_pretrained(MULTIMODAL / "base").eval()
    rows = scans["test"][:60]
    images = [row["image"].convert("RGB") for row in rows]

    def written(prompt: str) -> list[str]:
        inputs = processor(text=[prompt] * len(rows), images=images, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    named = [text == make.scan_of(row["digit"]) for text, row in zip(written(make.CAPTION), rows, strict=True)]
    even = [text == row["even"] for text, row in zip(written(make.EVEN), rows, strict=True)]
    assert np.mean(named) > 0.9
    assert np.mean(even) < 0.1


def test_a_few_steps_of_pretraining_make_a_base(tmp_path: Path, scans: dict[str, list[make.Row]]) -> None:
    texts = [list(map(make.in_words, range(20))), ["Is seven even?"]]
    for name in ("first", "second"):
        make.pretrain(tmp_path / name, scans["pretrain"][:60], texts, steps=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    processor = AutoProcessor.from_pretrained(tmp_path / "first")
    for prompt, question in make.WRITTEN_OUT.items():
        ids = processor(text=prompt, images=scans["train"][0]["image"].convert("RGB"))["input_ids"][0]
        assert ids.count(processor.image_token_id) == make.PIECES
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == question
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    shown = processor(text="?", images=scans["train"][0]["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
    assert model.get_image_features(shown).pooler_output.shape == (1, make.PIECES, make.WIDTH)


def test_gaps_hide_words_and_numbers_are_in_order() -> None:
    random = np.random.default_rng(0)
    value = {make.in_words(number): number for number in range(1000)}
    for _ in range(50):
        counted = [value[number] for number in make.count(random).split(", ")]
        steps = np.diff(counted)
        assert len(counted) == 4
        assert abs(steps[0]) in (1, 2, 3)
        assert set(steps.tolist()) == {steps[0]}
        before, _, after = make.with_gap("a b c d e", random).partition("<mask>")
        assert "a b c d e".startswith(before.strip())
        assert "a b c d e".endswith(after.strip())
        assert 2 <= len((before + after).split()) <= 4


def test_the_script_prints_its_table(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment |= {"SEEDS": "1", "EXAMPLES": "8", "TARGETS": "l-odd-or-even", "EPOCHS": "2"}
    command = ["bash", str(MULTIMODAL / "run.sh"), str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    matrix = re.findall(r"^ *\d+ ((?:v|vl|l)-\S+) +((?: *-?\d+| *·)+)$", result.stdout, re.MULTILINE)
    assert len(matrix) == len(make.POOL) + len(make.TWINS)
    assert all(len(cells.split()) == len(matrix) for _, cells in matrix)
    table = result.stdout.partition("Test accuracy")[2]
    values = dict(re.findall(r"^(\S.*?)  +(\d+\.\d) ±", table, re.MULTILINE))
    assert list(values) == [
        "bare base",
        "fresh LoRA",
        "best single expert, not trained",
        "best single expert, trained further",
        "π-Tuning: own + 2 of its modality",
        "π-Tuning: own + 2 of other modalities",
        "π-Tuning: own + the 2 best of all",
    ]
    assert (tmp_path / "work" / "l-odd-or-even.json").is_file()
