"""The road of the README, typed line after line in one folder, and one line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import open_expert
from tests.support.cli import Shell
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import relative_difference
from tests.support.tasks import write_image_task

TASKS = {
    "parity": lambda digit: digit % 2,
    "round": lambda digit: int(digit in (0, 6, 8, 9)),
    "small": lambda digit: int(digit < 5),
    "prime": lambda digit: int(digit in (2, 3, 5, 7)),
}


@pytest.fixture
def pool(tmp_path: Path, make_expert: MakeExpert, vit_base: Path, scans: tuple[list[Any], list[int]]) -> Path:
    """./experts: an expert for each of four questions about digits, all from one init."""
    images, digits = scans
    for seed, (name, answer) in enumerate(TASKS.items()):
        task = write_image_task(tmp_path / "tasks" / name, images[:80], list(map(answer, digits[:80])), ["no", "yes"])
        make_expert(tmp_path / "experts" / name, vit_base, task, seed=seed)
    return tmp_path / "experts"


def line(text: str) -> list[str]:
    """The arguments of a line as it is typed."""
    name, *arguments = text.split()
    assert name == "pimerge"
    return arguments


def test_the_lines_run_one_after_the_other(pool: Path, shell: Shell, tmp_path: Path) -> None:
    for text in (
        "pimerge embed ./experts",
        "pimerge rank --target parity -k 2 --no-gate",  # experts with random weights help nobody
        "pimerge merge --method uniform",
        "pimerge tune --method learned --epochs 2",
        "pimerge eval tuned merged",
        "pimerge inspect",
    ):
        result = shell(*line(text))
        assert result.code == 0, result.err
        assert result.out

    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert {candidate["name"] for candidate in ranking["candidates"]} == TASKS.keys() - {"parity"}
    gains = [candidate["gain"] for candidate in ranking["candidates"]]
    assert gains == sorted(gains, reverse=True)
    best = ranking["candidates"][:2]
    assert ranking["selected"] == [candidate["name"] for candidate in best]

    deltas = [
        {
            module: candidate["scale"] * delta
            for module, delta in dense_deltas(open_expert(pool / candidate["name"])).items()
        }
        for candidate in best
    ]
    weights = json.loads((tmp_path / "tuned" / "coefficients.json").read_text())["weights"]
    merged, tuned = (dense_deltas(open_expert(tmp_path / name)) for name in ("merged", "tuned"))
    assert merged.keys() == tuned.keys() == deltas[0].keys()
    for module in merged:
        parts = [delta[module] for delta in deltas]
        assert relative_difference(merged[module], (parts[0] + parts[1]) / 2) < 1e-5
        expected = sum(w * part for w, part in zip(weights[module], parts, strict=True))
        assert relative_difference(tuned[module], expected) < 1e-5

    by_weights = shell(*line("pimerge merge --coefficients tuned/coefficients.json -o again --head none"))
    assert by_weights.code == 0, by_weights.err
    for module, delta in dense_deltas(open_expert(tmp_path / "again")).items():
        assert relative_difference(delta, tuned[module]) < 1e-5

    scored = shell(*line("pimerge eval tuned merged --json")).document
    assert [row["name"] for row in scored["scores"]] == ["(base)", "tuned", "merged"]
    assert {row["examples"] for row in scored["scores"]} == {20}

    joined = shell(*line("pimerge embed tuned merged --json"))  # what was made can join the pool
    assert joined.code == 0, joined.err
    assert joined.document["computed"] == ["tuned", "merged"] or joined.document["computed"] == ["merged", "tuned"]


def test_a_mistake_in_a_process_of_its_own_ends_with_three(tmp_path: Path) -> None:
    """As a shell script sees it: status 3, a message on standard error, nothing on standard output."""
    finished = subprocess.run(
        [sys.executable, "-m", "pimerge", "rank", "--target", "nobody"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 3
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: there is no store 'embeddings.json'")
    assert "Traceback" not in finished.stderr
