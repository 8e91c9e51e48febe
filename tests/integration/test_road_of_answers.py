"""The road with bases that answer in text: every command, with classes and with free answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pimerge.adapters.expert import open_expert
from tests.support.cli import Shell
from tests.support.experts import MakeExpert
from tests.support.tasks import write_text_task

Pool = Callable[[str], Path]
FREE = {"labels": None, "columns": {}, "answer": "{{ colour }}", "max_new_tokens": 3}


@pytest.fixture
def pool(tmp_path: Path, make_expert: MakeExpert, language_base: Callable[[str], Path]) -> Pool:
    """./experts for a base of that name, from one init: two with classes, one with free answers; and ./tasks."""

    def make(name: str) -> Path:
        swapped = {"dog": "cat", "cat": "dog"}
        for seed, (task, fields) in enumerate({"animal": {}, "swapped": {"verbalizer": swapped}, "free": FREE}.items()):
            folder = write_text_task(tmp_path / "tasks" / task, name, 16, **fields)
            make_expert(tmp_path / "experts" / task, language_base(name), folder, seed=seed)
        return tmp_path / "experts"

    return make


@pytest.mark.parametrize("name", ["t5", "llama-lm"])
def test_the_lines_run_one_after_the_other(pool: Pool, shell: Shell, tmp_path: Path, name: str) -> None:
    pool(name)
    for line in (
        "inspect experts",
        "embed experts",
        "rank --target animal -k 2 --no-gate",
        "merge --method uniform",
        "tune --method learned --epochs 1 --shots 6",
        "tune --method uniform --output mean",
        "tune --method interpolated --epochs 1 --output pi",
        "rank --target animal --measure leep --output leep.json",
        "rank --target animal --measure loss --output loss.json",
        "embed experts/animal experts/swapped --labels sampled --store sampled.json",
    ):
        result = shell(*line.split())
        assert result.code == 0, (line, result.err)
    again = shell("tune", "--method", "uniform", "--output", "again")
    assert "'uniform'" in again.err
    result = shell("eval", "tuned", "merged", "mean", "pi", "--json")
    names = [row["name"] for row in result.document["scores"]]
    assert names == ["(base)", "tuned", "merged", "mean", "pi"]
    by_name = {row["name"]: row for row in result.document["scores"]}
    assert by_name["mean"]["loss"] == pytest.approx(by_name["merged"]["loss"], rel=1e-4)
    assert json.loads((tmp_path / "merged" / "task.json").read_text())["prompt"] == "the {{ words }}:"
    assert open_expert(tmp_path / "tuned").head == {}


def test_free_answers_are_ranked_by_the_store_which_says_why(pool: Pool, shell: Shell, tmp_path: Path) -> None:
    pool("t5")
    assert shell("embed", "experts").code == 0
    for target in (
        "free",
        str(write_text_task(tmp_path / "tasks" / "new", "t5", 16, **{**FREE, "prompt": "{{ words }}"})),
    ):
        result = shell("rank", "--target", target, "--shots", "6", "--force", "--json")
        assert result.code == 0, result.err
        assert result.document["measure"] == "fisher"
        assert "the task has no classes" in " ".join(result.document["notes"])
    refused = shell("rank", "--target", "free", "--measure", "logme", "--output", "by-logme.json")
    assert refused.code == 3
    assert "the task has no classes" in refused.err
    sampled = shell("embed", "experts/free", "--labels", "sampled", "--store", "sampled.json")
    assert sampled.code == 3
    assert "free text" in sampled.err
    scored = shell("eval", "experts/free", "--target", "tasks/free")
    assert scored.code == 0, scored.err
    assert "answers were cut at max_new_tokens" in scored.err


def test_what_has_no_head_cannot_train_one_alone(pool: Pool, shell: Shell, tmp_path: Path) -> None:
    pool("gpt2-lm")
    result = shell("tune", "--method", "head", "--target", "animal", "--output", "head")
    assert result.code == 3
    result = shell("tune", "--method", "head", "--target", "experts/animal", "--output", "head")
    assert result.code == 3
    assert "has none to train" in result.err
    assert not (tmp_path / "head").exists()
    base = open_expert(tmp_path / "experts" / "free").base.source
    few = shell("tune", "--method", "scratch", "--target", "tasks/free", "--shots", "17", "--base", base)
    assert few.code == 3
    assert "there are 16 examples, 17 were asked for" in few.err
