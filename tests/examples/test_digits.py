"""The digits example: its data matches its description, and its script runs and prints its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Image, load_dataset
from sklearn.datasets import load_digits

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases, resolve_device, resolve_dtype
from pimerge.ranking.by_store import rank_by_store
from pimerge.ranking.measure import MEASURES
from pimerge.ranking.selection import SelectionRule

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
RELATED = {
    "X": {"inverted-0-6", "inverted-3-9"},
    "inverted-0-6": {"X", "inverted-3-9"},
    "inverted-3-9": {"X", "inverted-0-6"},
    "outlined-0-6": {"outlined-3-9"},
    "outlined-3-9": {"outlined-0-6"},
    "rotated-0-6": {"rotated-3-9"},
    "rotated-3-9": {"rotated-0-6"},
    "parity": {"noisy-parity"},
    "noisy-parity": {"parity"},
}


def numbers(task: str, split: str) -> set[int]:
    """The numbers of the scans in a split."""
    return set(pq.read_table(DIGITS / "tasks" / task / f"{split}.parquet")["number"].to_pylist())


def test_the_data_is_every_scan_of_scikit_learn() -> None:
    file = str(DIGITS / "data" / "digits.parquet")
    rows = load_dataset("parquet", data_files=file, split="train")
    digits = load_digits()
    assert isinstance(rows.features["image"], Image)
    assert len(rows) == len(digits.target) == 1797
    assert rows["label"] == digits.target.tolist()
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    np.testing.assert_array_equal(pixels, np.round(digits.images * 255 / 16))
    assert b"UCI" in pq.read_schema(file).metadata[b"attribution"]


def test_no_task_uses_an_image_that_the_base_or_another_split_was_trained_on() -> None:
    table = pq.read_table(DIGITS / "data" / "digits.parquet")
    part = dict(zip(table["number"].to_pylist(), table["part"].to_pylist(), strict=True))
    allowed = {"train": {"train", "few"}, "draws": {"draws"}, "test": {"test"}}
    for folder in (DIGITS / "tasks").iterdir():
        for file in folder.glob("*.parquet"):
            found = {part[number] for number in numbers(folder.name, file.stem)}
            assert found <= allowed[file.stem] or (folder.name, file.stem, found) == ("new", "train", {"draws"})
    assert len(numbers("X", "train")) == 50
    assert not numbers("X", "train") & numbers("inverted-0-6", "train")


def test_everything_committed_is_below_2_mb() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z", str(DIGITS)], capture_output=True, cwd=DIGITS, check=False)
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    files = [DIGITS.parents[1] / name for name in tracked.stdout.decode().split("\0") if name]
    assert sum((DIGITS / Path(name)).stat().st_size for name in files if name.exists()) < 2 * 10**6


def test_related_experts_are_nearest(tmp_path: Path) -> None:
    device = resolve_device("cpu")
    bases, store = Bases(device, resolve_dtype("auto", device)), Store(tmp_path / "embeddings.json")
    for folder in find_experts(DIGITS / "experts"):
        expert = open_expert(folder)
        embed_expert(expert, check_expert(expert), store, EmbedSettings(), bases)
    for target, related in RELATED.items():
        ranking = rank_by_store(store, target, MEASURES.load("fisher"), SelectionRule(len(related), gate=False))
        assert set(ranking.selected) == related
        assert not ranking.not_comparable


def test_the_script_prints_its_table(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "SEEDS": "1"}
    command = ["bash", str(DIGITS / "run.sh"), str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    table = result.stdout.partition("Methods and controls")[2].splitlines()[3:10]
    values = {line.split()[0]: float(line.partition("%")[0].split()[-1]) for line in table}
    assert values.keys() == {"head", "scratch", "single", "uniform", "learned", "interpolated", "guided"}
    assert values["single"] > values["head"]
    assert "With one seed no method can be told from another" in result.stdout
    assert (tmp_path / "work" / "tuned" / "adapter_model.safetensors").is_file()
