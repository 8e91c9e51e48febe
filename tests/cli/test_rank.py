"""``pimerge rank`` as it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pimerge.compatibility import check_expert
from pimerge.embedding import embed
from pimerge.expert import open_expert
from pimerge.model import Bases
from pimerge.store import Settings, Store
from tests.conftest import MakeExpert, Shell

NAMES = ("parity", "a", "b", "other-rank")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path) -> Path:
    """A pool with its store."""
    folder = tmp_path_factory.mktemp("made")
    store, bases = Store(folder / "embeddings.json"), Bases(torch.device("cpu"), torch.float32)
    for seed, name in enumerate(NAMES):
        rank = 2 if name == "other-rank" else 4
        expert = open_expert(make_expert(folder / "experts" / name, vit_base, parity_task, seed=seed, r=rank))
        embed(expert, check_expert(expert), store, Settings(max_examples=8), bases)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """./experts and ./embeddings.json, as deep as they were made."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def test_the_ranking_is_written_and_shown(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "-k", 1)
    assert result.code == 0
    ranking = json.loads((folder / "ranking.json").read_text())
    assert {candidate["name"] for candidate in ranking["candidates"]} == {"a", "b"}
    assert ranking["selected"] == [ranking["candidates"][0]["name"]]
    for candidate in ranking["candidates"]:
        assert f"{candidate['score']:.4f}" in result.out
    assert "not comparable: its rank is 2, the target's 4" in result.out
    assert "next: pimerge tune --method learned" in result.err


def test_json_is_the_ranking_itself(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "--json", "--quiet")
    assert result.document == json.loads((folder / "ranking.json").read_text())
    assert result.err == ""


def test_a_target_may_be_given_by_folder(folder: Path, shell: Shell) -> None:
    by_name = shell("rank", "--target", "parity", "--json").document
    assert shell("rank", "--target", "experts/parity/", "--json").document == by_name
    assert shell("rank", "--target", folder / "experts" / "parity", "--json").document == by_name


def test_an_unknown_target_suggests_the_nearest(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "partiy")
    assert result.code == 3
    assert result.out == ""
    assert "there is no target 'partiy'" in result.err
    assert "did you mean 'parity'?" in result.err
    assert not (folder / "ranking.json").exists()


def test_a_folder_outside_the_store_is_embedded_first(folder: Path, shell: Shell) -> None:
    shutil.copytree(folder / "experts" / "a", folder / "outside" / "new")
    result = shell("rank", "--target", "outside/new", "--json")
    assert result.code == 0
    assert "new is not in the store yet: embedding it" in result.err
    store = json.loads((folder / "embeddings.json").read_text())["experts"]
    assert store["new"]["settings"] == store["a"]["settings"]
    assert store["new"]["sidecar_sha256"] == store["a"]["sidecar_sha256"]
    assert result.document["candidates"][0]["name"] == "a"
    assert result.document["candidates"][0]["score"] == pytest.approx(1)


def test_a_folder_outside_with_a_name_of_the_store_is_refused(folder: Path, shell: Shell) -> None:
    shutil.copytree(folder / "experts" / "a", folder / "outside" / "b")
    result = shell("rank", "--target", "outside/b")
    assert result.code == 3
    assert "has another expert of the name 'b'" in result.err


def test_a_target_that_changed_says_to_embed_again(
    folder: Path, shell: Shell, make_expert: MakeExpert, vit_base: Path
) -> None:
    make_expert(folder / "experts" / "parity", vit_base, seed=9)
    result = shell("rank", "--target", "parity")
    assert result.code == 3
    assert "has changed since it was embedded" in result.err
    assert "run 'pimerge embed' again" in result.err


def test_the_same_ranking_again_is_fine_and_another_needs_force(folder: Path, shell: Shell) -> None:
    assert shell("rank", "--target", "parity").code == 0
    assert shell("rank", "--target", "parity").code == 0
    refused = shell("rank", "--target", "a")
    assert refused.code == 3
    assert "pass --force" in refused.err
    assert json.loads((folder / "ranking.json").read_text())["target"]["name"] == "parity"
    assert shell("rank", "--target", "a", "--force").code == 0
    assert json.loads((folder / "ranking.json").read_text())["target"]["name"] == "a"


def test_another_measure_and_output(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "--measure", "delta", "-k", 9, "-o", "deep/r.json", "--json")
    assert {candidate["name"] for candidate in result.document["candidates"]} == {"a", "b", "other-rank"}
    assert {candidate["path"] for candidate in result.document["candidates"]} == {
        f"../experts/{name}" for name in ("a", "b", "other-rank")
    }
    assert (
        "only 3 experts are comparable, 9 were asked for"
        in shell("rank", "--target", "parity", "--measure", "delta", "-k", 9).err
    )


def test_nobody_to_compare_with_is_a_valid_answer(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "other-rank")
    assert result.code == 0
    assert "no expert of the store can be compared with other-rank" in result.err
    assert json.loads((folder / "ranking.json").read_text())["selected"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--target", "parity", "-k", "0"], 3, "-k is 0"),
        (["--target", "parity", "--measure", "fihser"], 3, "did you mean 'fisher'?"),
        (["--target", "parity", "--store", "nowhere.json"], 3, "there is no store 'nowhere.json'"),
        ([], 2, "--target"),
        (["--target", "parity", "-k", "two"], 2, "-k"),
    ],
)
def test_wrong_input_ends_with_its_code_and_a_message(
    folder: Path, shell: Shell, arguments: list[str], code: int, expected: str
) -> None:
    result = shell("rank", *arguments)
    assert result.code == code
    assert result.out == ""
    assert expected in result.err
    assert "Traceback" not in result.err
