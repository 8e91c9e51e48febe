"""The command ``pimerge compare``."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import Expert, open_expert
from pimerge.evaluation import runner as comparing
from pimerge.evaluation.schema import read_comparison
from pimerge.evaluation.scoring import score_experts
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from tests.support.cli import Finished, Shell
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json
from tests.support.tuning import tune

QUICK = ("--epochs", 2, "--seeds", 2, "--shots", 4)


@pytest.fixture
def compare(shell: Shell, tmp_path: Path, made: Path) -> Callable[..., Finished]:
    """``pimerge compare`` on ./experts, for an epoch or two."""
    shutil.copytree(made, tmp_path / "experts")

    def run(*arguments: object) -> Finished:
        return shell("compare", "experts", "--target", "experts/x", *arguments)

    return run


def scores(path: Path = Path("comparison.json")) -> dict[tuple[str, int, int], float]:
    return {(run.method, run.seed, run.k): run.scores["test"] for run in read_comparison(path).runs}


def test_a_run_is_what_tune_and_eval_give(compare: Any, tmp_path: Path) -> None:
    """Of the same experts, draw and options, one after the other in files of their own."""
    found = compare(*QUICK, "--rank-by", "ranking", "--methods", "learned,interpolated,anisotropic", "-q")
    assert found.code == 0, found.err
    pool = [open_expert(tmp_path / "experts" / name) for name in ("y", "z")]
    task = open_task(tmp_path / "experts" / "x")
    for method, asked, experts in (
        ("learned", "learned", pool),
        ("interpolated", "interpolated", pool),
        ("anisotropic", "anisotropic", pool),
        ("single", "uniform", pool[:1]),
        ("scratch", "scratch", []),
        ("full", "full", []),
    ):
        for seed in range(2):
            options = TrainingOptions(epochs=2, shots=4, seed=seed, init_seed=seed, holdout=0.0)
            output = tmp_path / f"{method}-{seed}"
            tune(asked, task, pool[0].base, experts, None, output, options, like=pool[0], device="cpu")
            expected = _accuracy(output, pool[0])
            assert scores()[method, seed, len(experts)] == pytest.approx(expected), (method, seed)


def _accuracy(output: Path, like: Expert) -> float:
    from pimerge.evaluation.scoring import score_checkpoint

    task = open_task(output)
    if (output / "config.json").is_file():
        return score_checkpoint(output, task, device="cpu").accuracy
    expert = open_expert(output)
    rows = score_experts([expert], task, expert.base, None, device="cpu")
    return rows[-1].accuracy


def test_class_names_are_examples_of_guided_and_its_control_or_of_all(
    shell: Shell, make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate("xyz"):
        make_expert(tmp_path / "experts" / name, bert_base, text_task, seed=seed)
    arguments = ("compare", "experts", "--target", "experts/x", "--methods", "guided", "--epochs", 1, "--seeds", 1)
    found = shell(*arguments, "--shots", 4)
    assert found.code == 0, found.err
    usual = {"head", "scratch", "full", "single", "uniform"}
    assert {method for method, _, _ in scores()} == {*usual, "named", "guided"}
    line = next(line for line in read_comparison(Path("comparison.json")).lines if line.method == "named")
    assert line.control

    small = (*arguments, "--shots", 2, "--controls", "head", "--output", "small.json")
    for wish in ("--class-names", "--no-class-names"):
        assert shell(*small, wish, "--force").code == 0
        runs = read_comparison(Path("small.json")).runs
        assert {run.method: run.class_names for run in runs} == dict.fromkeys(
            ("head", "guided"), wish == "--class-names"
        )


def test_it_says_what_it_found_in_three_files(compare: Any) -> None:
    found = compare(*QUICK, "--methods", "learned", "--controls", "head,single", "--experts", "1,2")
    assert found.code == 0, found.err
    document = read_comparison(Path("comparison.json"))
    assert {(run.method, run.k) for run in document.runs} == {
        ("head", 0),
        ("single", 1),
        ("learned", 1),
        ("learned", 2),
    }
    assert document.conclusion in found.out
    text = Path("comparison.md").read_text()
    assert document.conclusion in text
    assert "| head (control) | – |" in text
    rows = list(csv.DictReader(Path("comparison.csv").read_text().splitlines()))
    assert len(rows) == len(document.runs) == 8
    assert {row["shots"] for row in rows} == {"4"}
    assert sorted(float(row["accuracy"]) for row in rows) == sorted(scores().values())


def test_the_same_again_runs_nothing_and_changes_nothing(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*QUICK, "--methods", "learned", "--controls", "head")
    assert compare(*arguments).code == 0
    before = Path("comparison.json").read_bytes()
    monkeypatch.setattr(comparing, "open_session", None)  # the base is not even loaded
    again = compare(*arguments)
    assert again.code == 0, again.err
    assert Path("comparison.json").read_bytes() == before


def test_a_larger_comparison_makes_only_the_new_runs(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(*QUICK, "--methods", "learned", "--controls", "head").code == 0
    first = scores()
    refused = compare(*QUICK, "--methods", "learned,uniform", "--controls", "head")
    assert refused.code == 3
    assert "--force" in refused.err
    assert scores() == first
    assert not list(Path("comparison.runs").glob("uniform-*")), "it was refused before anything ran"
    made = {path: path.stat().st_mtime_ns for path in Path("comparison.runs").glob("*.json")}
    monkeypatch.setattr(comparing, "rank_by_examples", None)  # the draws are ranked already
    assert compare(*QUICK, "--methods", "learned,uniform", "--controls", "head", "--force").code == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert scores().items() > first.items()


def test_another_ranking_is_another_run(compare: Any, shell: Shell) -> None:
    assert shell("embed", "experts").code == 0
    assert shell("rank", "--target", "x", "-k", 2, "--no-gate", "--shots", 4).code == 0
    arguments = ("--target", "experts/x", *QUICK, "--rank-by", "ranking", "--methods", "uniform", "--controls", "none")
    assert shell("compare", *arguments).code == 0
    ranking = json.loads(Path("ranking.json").read_text())
    ranking["candidates"][0]["scale"] /= 2
    write_json(Path("ranking.json"), ranking)
    assert shell("compare", *arguments, "--force").code == 0
    assert len(list(Path("comparison.runs").glob("uniform-*"))) == 4


def test_an_interrupted_comparison_continues(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*QUICK, "--methods", "learned", "--controls", "head")
    done = 0
    score = comparing.score_model

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done > 2:
            raise KeyboardInterrupt
        return score(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "score_model", killed)
        assert compare(*arguments).code == 130
    assert len(list(Path("comparison.runs").glob("*.json"))) == 2
    assert not Path("comparison.json").exists()
    assert compare(*arguments).code == 0
    interrupted = scores()
    shutil.rmtree("comparison.runs")
    assert compare(*arguments, "--output", "whole.json").code == 0
    assert scores(Path("whole.json")) == interrupted


def test_two_processes_share_the_runs(compare: Any, tmp_path: Path) -> None:
    arguments = ["compare", "experts", "--target", "experts/x", *map(str, QUICK), "--methods", "learned", "-q"]
    together = tmp_path / "together"
    together.mkdir()
    (together / "experts").symlink_to(tmp_path / "experts")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pimerge"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments, "--output", "two.json"], check=True, env=environment, capture_output=True)
    assert compare(*QUICK, "--methods", "learned", "-q").code == 0
    assert scores(Path("two.json")) == scores()


def test_further_test_sets_are_scored(compare: Any, tmp_path: Path, parity_task: Path) -> None:
    other = shutil.copytree(parity_task, tmp_path / "upside-down")
    found = compare(*QUICK, "--methods", "learned", "--controls", "head", "--also-test", other)
    assert found.code == 0, found.err
    assert {line.test for line in read_comparison(Path("comparison.json")).lines} == {"test", "upside-down"}


def test_learning_rates_are_chosen_on_folds(compare: Any) -> None:
    found = compare(
        "--epochs", 1, "--seeds", 1, "--shots", 4, "--methods", "learned", "--controls", "head", "--select", "cv"
    )
    assert found.code == 0, found.err
    assert read_comparison(Path("comparison.json")).conclusion.startswith("With one seed")


def test_what_does_not_fit_is_told_at_once(compare: Any) -> None:
    found = compare("--shots", "5,x", "--experts", "2q", "--lr", "a", "--methods", "larned", "--controls", "none")
    assert found.code == 3
    for part in ("'x'", "'2q'", "'a'", "'larned'", "learned"):
        assert part in found.err
    assert not Path("comparison.runs").exists()


def test_more_than_the_data_gives_is_refused_before_anything_runs(compare: Any) -> None:
    found = compare("--shots", "4,5000", "--experts", "2")
    assert found.code == 3
    assert "5000 shots are asked for" in found.err
    assert compare("--experts", "7").code == 3
    assert not Path("comparison.runs").exists()


def test_a_test_set_of_other_classes_is_refused(compare: Any, tmp_path: Path, parity_task: Path) -> None:
    other = shutil.copytree(parity_task, tmp_path / "other")
    document = json.loads((other / "task.json").read_text())
    write_json(other / "task.json", {**document, "labels": ["a", "b"]})
    found = compare(*QUICK, "--also-test", other)
    assert found.code == 3
    assert "needs the target's task type and classes" in found.err


def test_a_run_that_fails_is_named_and_those_before_it_are_kept(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    found = compare(*QUICK, "--methods", "gradient-free", "--controls", "head")
    assert found.code == 3
    assert "gradient-free, 4 shots, seed 0: 'gradient-free' needs nevergrad" in found.err
    assert [path.name.partition("-")[0] for path in Path("comparison.runs").glob("*.json")] == ["head"]


def test_a_damaged_run_is_named(compare: Any) -> None:
    arguments = (*QUICK, "--methods", "learned", "--controls", "head")
    assert compare(*arguments).code == 0
    (damaged, *_) = Path("comparison.runs").glob("head-*.json")
    for content in ("{", '{"method": "head"}'):
        damaged.write_text(content)
        found = compare(*arguments)
        assert found.code == 3
        assert damaged.name in found.err
        assert "delete the file; it is created again" in found.err
    damaged.unlink()
    assert compare(*arguments, "--force").code == 0
