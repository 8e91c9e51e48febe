"""The command ``pimerge plot``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.reporting.figures import _canvas
from tests.support.cli import Shell
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json

FILES = ["path.json", "path.png", "path.svg"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Experts and a ranking of y and z for x; w has no ΔW."""
    folder = tmp_path_factory.mktemp("made") / "deep"
    for seed, name in enumerate("xyz"):
        make_expert(folder / name, vit_base, parity_task, seed=seed, r=2)
    make_expert(folder / "w", vit_base, parity_task, kind="bitfit")
    sha256 = {name: open_expert(folder / name).sha256 for name in "xyzw"}
    ranking = Ranking(
        target=Target(name="x", path="x", sha256=sha256["x"]),
        measure="combined",
        k=1,
        selected=["y"],
        why="",
        candidates=[
            Candidate(name=name, path=name, sha256=sha256[name], score=score, low=0, high=1, scale=0.5)
            for name, score in (("y", 0.5), ("z", 0.25), ("w", 0.1))
        ],
        not_comparable=[],
    )
    write_json(folder / "ranking.json", ranking.model_dump())
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell) -> Path:
    """The working folder, as deep as it was made."""
    shutil.copytree(made, tmp_path / "deep")
    monkeypatch.chdir(tmp_path / "deep")
    return tmp_path / "deep"


def written(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in (".png", ".svg") or file.name in FILES)


def test_path_then_gain_then_once_more_from_the_data(folder: Path, shell: Shell) -> None:
    result = shell("plot", "path", "--step", "0.5", "--limit", "20", "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document == json.loads((folder / "path.json").read_text())
    assert [path["expert"] for path in document["paths"]] == ["y", "z"]
    assert list(document["left_out"]) == ["w"]
    assert "→ path.png, path.svg, path.json" in result.err
    before = {name: (folder / name).read_bytes() for name in FILES}
    again = shell("plot", "path", "--data", "path.json", "--output", "again/p.svg", "--quiet")
    assert (again.code, again.out, again.err) == (0, "", "")
    assert {f"path{file.suffix}": file.read_bytes() for file in (folder / "again").iterdir()} == before
    gain = shell("plot", "gain", "--json").document
    assert [point["score"] for point in gain["points"]] == [0.5, 0.25]


def test_named_experts_are_taken_by_name_or_folder(folder: Path, shell: Shell) -> None:
    document = shell("plot", "path", "z", str(folder / "y"), "--step", "1", "--limit", "10", "--json").document
    assert [path["expert"] for path in document["paths"]] == ["z", "y"]


def test_landscape_and_weights_of_what_was_tuned(folder: Path, shell: Shell) -> None:
    command = ["tune", "y", "z", "--method", "uniform", "--target", "x", "--epochs", "1", "--output", "tuned"]
    assert shell(*command, "--quiet").code == 0
    document = shell("plot", "weights", "--json").document
    assert (document["experts"], document["method"]) == (["y", "z"], "uniform")
    asked = ["--grid", "3", "--limit", "10", "--coefficients", "tuned/coefficients.json", "--json"]
    result = shell("plot", "landscape", *asked)
    assert result.code == 0, result.err
    marks = {mark["name"]: mark for mark in result.document["marked"]}
    assert marks["tuned"]["weights"] == pytest.approx([0, 0.5, 0.5], abs=1e-6)
    assert marks["tuned"]["off"] == 0


def test_the_graph_of_a_store(folder: Path, shell: Shell) -> None:
    assert shell("embed", "x", "y", "z", "--quiet").code == 0
    document = shell("plot", "graph", "--json").document
    assert sorted(node["name"] for node in document["experts"]) == ["x", "y", "z"]
    assert (folder / "graph.png").is_file()


def test_nothing_is_overwritten_and_nothing_half_written(folder: Path, shell: Shell) -> None:
    (folder / "path.svg").write_text("mine")
    refused = shell("plot", "path", "--step", "1", "--limit", "10")
    assert refused.code == 3
    assert "--force" in refused.err
    assert written(folder) == ["path.svg"]
    (folder / "path.svg").unlink()
    (folder / "path.json").mkdir()
    refused = shell("plot", "path", "--step", "1", "--limit", "10", "--force")
    assert refused.code == 3
    assert "is a folder, so --force does not replace it" in refused.err
    assert written(folder) == ["path.json"]
    assert not [file for file in folder.iterdir() if "partial" in file.name]
    (folder / "path.json").rmdir()
    assert shell("plot", "path", "--step", "1", "--limit", "10").code == 0
    assert written(folder) == FILES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name one of"),
        (["grph"], "'graph'"),
        (["graph"], "pimerge embed ./experts"),
        (["gain"], "run 'pimerge plot path' first"),
        (["weights"], "run 'pimerge tune' first"),
        (["weights", "--tuned", "x"], "does not combine experts"),
        (["shots"], "run 'pimerge compare --target NAME' first"),
        (["landscape", "y"], "there are 2 with the target's"),
        (["path", "--ranking", "no.json"], "run 'pimerge rank --target NAME' first"),
        (["path", "nobody"], "nobody"),
        (["path", "w"], "its kind is bitfit|bitfit"),
        (["path", "x"], "name others"),
        (["path", "--measure", "delta"], "'path' has no option --measure"),
        (["shots", "--store", "s"], "'pimerge plot shots' does not read --store"),
        (["graph", "--step", "1", "--path", "p"], "does not read --path"),
        (["path", "--data", "nothing.json"], "nothing.json"),
        (["path", "--data", "ranking.json"], "ranking.json"),
        (["path", "--data", "ranking.json", "--step", "1"], "--step"),
        (["path", "--output", "x/adapter_config.json/p", "--step", "1", "--limit", "2"], "choose another --output"),
    ],
)
def test_wrong_input_says_what_to_do(folder: Path, shell: Shell, arguments: list[str], expected: str) -> None:
    result = shell("plot", *arguments)
    assert (result.code, result.out) == (3, "")
    assert any(part in result.err for part in expected.split("|")), result.err
    assert written(folder) == []


def test_a_target_without_an_expert_is_told_how_to_get_one(folder: Path, shell: Shell, parity_task: Path) -> None:
    result = shell("plot", "path", "y", "--target", os.path.relpath(parity_task, folder))
    assert result.code == 3
    assert "has no expert of its own" in result.err
    assert "pimerge rank --train-target" in result.err


def test_the_data_of_another_plot_or_a_broken_one_is_refused(folder: Path, shell: Shell) -> None:
    write_json(folder / "other.json", {"figure": "gain"})
    assert "holds the data of the plot 'gain'" in shell("plot", "path", "--data", "other.json").err
    write_json(folder / "other.json", {"figure": "path", "alphas": "many"})
    result = shell("plot", "path", "--data", "other.json")
    assert result.code == 3
    assert "run 'pimerge plot path' again" in result.err


def test_without_matplotlib_the_command_that_installs_it_is_said(
    folder: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_canvas, "find_spec", lambda name: None if name == "matplotlib" else object())
    result = shell("plot", "path")
    assert result.code == 3
    assert "plots need matplotlib, which is not installed" in result.err
    assert "pip install 'pimerge[plots]'" in result.err


def test_the_list_of_plots_needs_nothing(shell: Shell) -> None:
    result = shell("plot", "--figures")
    assert result.code == 0
    assert "graph" in result.out
    assert set(shell("plot", "--figures", "--json").document) >= {"gain", "graph", "path"}
