"""The command ``pimerge eval``."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.evaluation.scoring import score_experts
from pimerge.tasks.task import open_task
from tests.support.cli import Shell
from tests.support.experts import MakeExpert
from tests.support.tasks import write_image_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deep"
    for seed, name in enumerate(("x", "tuned", "merged")):
        make_expert(folder / name, vit_base, parity_task, seed=seed)
    make_expert(folder / "headless", vit_base, head=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell) -> Path:
    """./x, ./tuned and ./merged in the working folder, as deep as they were made."""
    shutil.copytree(made, tmp_path / "deep")
    monkeypatch.chdir(tmp_path / "deep")
    return tmp_path / "deep"


def test_tuned_and_merged_are_scored_by_default_beside_the_base(folder: Path, shell: Shell) -> None:
    x = open_expert(folder / "x")
    experts = [open_expert(folder / name) for name in ("tuned", "merged")]
    expected = [asdict(score) for score in score_experts(experts, open_task(x.path), x.base, x)]
    document = shell("eval", "--target", "x", "--json").document
    assert document == {"target": "x", "split": "test", "scores": expected}
    assert [score["name"] for score in document["scores"]] == ["(base)", "tuned", "merged"]


def test_the_table_goes_to_standard_output_and_the_rest_elsewhere(folder: Path, shell: Shell) -> None:
    result = shell("eval", "merged", "--target", "x")
    assert result.code == 0
    (score,) = [
        s for s in shell("eval", "merged", "--target", "x", "--json").document["scores"] if s["name"] == "merged"
    ]
    assert f"{score['accuracy']:.1%}" in result.out
    assert f"{score['loss']:.3f}" in result.out
    assert "the head of x" in result.out
    assert "on the test split of x" in result.err
    assert shell("eval", "merged", "--target", "x", "--quiet").err == ""


def test_without_a_target_the_first_experts_task_is_taken(folder: Path, shell: Shell) -> None:
    document = shell("eval", "merged", "--json").document
    assert document["target"] == "merged"


def test_the_result_can_be_written(folder: Path, shell: Shell) -> None:
    result = shell("eval", "tuned", "--target", "x", "-o", "scores.json", "--json")
    assert json.loads((folder / "scores.json").read_text()) == result.document
    assert shell("eval", "tuned", "--target", "x", "-o", "scores.json").code == 0  # the same scores
    refused = shell("eval", "merged", "--target", "x", "-o", "scores.json")
    assert refused.code == 3
    assert "--force" in refused.err
    assert "merged" in refused.out  # what was computed is not lost
    assert json.loads((folder / "scores.json").read_text()) == result.document
    assert shell("eval", "merged", "--target", "x", "-o", "scores.json", "--force").code == 0


@pytest.mark.parametrize("more", [[], ["--force"]])
def test_an_output_that_holds_something_else_is_refused_before_scoring(
    folder: Path, shell: Shell, more: list[str]
) -> None:
    (folder / "kept.json").write_text('{"target": "x", "base": "b", "experts": []}')
    (folder / "kept").mkdir()
    for name in ("kept.json", "kept"):
        refused = shell("eval", "tuned", "--target", "x", "-o", name, *more)
        assert (refused.code, refused.out) == (3, "")
        assert f"'{name}'" in refused.err
    assert json.loads((folder / "kept.json").read_text())["base"] == "b"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["headless", "nowhere/1"], 3, "nowhere/1"),
        (["headless", "--target", "x"], 3, "'headless'"),
        (["headless"], 3, "the target is not known"),
        (["tuned", "--target", "nowhere/1"], 3, "nowhere/1"),
        (["tuned", "--device", "gpu"], 3, "'gpu'"),
        (["tuned", "--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_wrong_input_ends_with_its_code_and_a_message(
    folder: Path, shell: Shell, arguments: list[str], code: int, expected: str
) -> None:
    result = shell("eval", *arguments)
    assert result.code == code
    assert result.out == ""
    assert expected in result.err
    assert "Traceback" not in result.err


def test_nothing_to_score_says_what_to_do(shell: Shell) -> None:
    result = shell("eval")
    assert result.code == 3
    assert "there is nothing to score" in result.err
    assert "pimerge tune" in result.err


def test_one_test_example_has_no_interval_of_the_loss(
    folder: Path, scans: tuple[list[Any], list[int]], shell: Shell
) -> None:
    images, digits = scans
    parity = [digit % 2 for digit in digits]
    task = write_image_task(folder / "one", images[:4], parity[:4], ["even", "odd"])
    assert shell("eval", "x", "--target", task, "--quiet").out.count("–") >= 1
    ended = shell("eval", "x", "--target", task, "--json", "--output", "scores.json")
    score = ended.document["scores"][-1]
    assert (score["loss_low"], score["loss_high"], score["examples"]) == (None, None, 1)
    assert 0 <= score["accuracy_low"] <= score["accuracy"] <= score["accuracy_high"] <= 1
    assert json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail) == ended.document
    assert shell("report").code == 0
