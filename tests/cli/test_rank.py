"""The command ``pimerge rank``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases
from tests.support.cli import Shell
from tests.support.experts import MakeExpert, edit_tensors
from tests.support.tasks import write_image_task, write_json

NAMES = ("parity", "a", "b", "other-rank")
STORED = ["--measure", "fisher-raw"]
"""A measure of the store that compares experts of one rank alone."""


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    scans: tuple[list[Any], list[int]],
) -> Path:
    """A pool with its store, and a task without an expert; the experts are strong enough to matter."""
    folder = tmp_path_factory.mktemp("made")
    images, digits = scans
    write_image_task(folder / "tasks" / "old", images[:24], [digit % 2 for digit in digits[:24]], ["even", "odd"])
    write_image_task(folder / "tasks" / "new", images[40:64], [int(d < 5) for d in digits[40:64]], ["high", "low"])
    store, bases = Store(folder / "embeddings.json"), Bases(torch.device("cpu"), torch.float32)
    for seed, name in enumerate(NAMES):
        rank = 2 if name == "other-rank" else 4
        path = make_expert(folder / "experts" / name, vit_base, folder / "tasks" / "old", seed=seed, r=rank)
        embed_expert(open_expert(path), check_expert(open_expert(path)), store, EmbedSettings(max_examples=8), bases)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """./experts, ./tasks and ./embeddings.json, as deep as they were made."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def forget_the_data(folder: Path) -> None:
    for file in (folder / "tasks").rglob("*.parquet"):
        file.unlink()


def set_labels(folder: Path, task: str, labels: list[int], scans: tuple[list[Any], list[int]]) -> None:
    """Another train and test split, in which a quarter of these rows is the latter's."""
    write_image_task(folder / "tasks" / task, scans[0][: len(labels)], labels, ["high", "low"])


def test_by_examples_the_gain_at_the_best_scale_is_written_and_shown(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "-k", 1, "--no-gate")
    assert result.code == 0, result.err
    ranking = json.loads((folder / "ranking.json").read_text())
    assert (ranking["measure"], ranking["base_score"], ranking["seen"]["examples"]) == ("combined", 0.0, 18)
    assert {candidate["name"] for candidate in ranking["candidates"]} == {"a", "b", "other-rank"}
    assert ranking["selected"] == [ranking["candidates"][0]["name"]]
    header, *rows = result.out.splitlines()
    assert header.split() == ["expert", "scale", "expected", "gain,", "points"]
    for candidate, row in zip(ranking["candidates"], rows, strict=True):
        assert candidate["score"] == candidate["gain"]
        assert candidate["low"] <= candidate["score"] <= candidate["high"]
        assert candidate["scale"] in (0.25, 0.5, 0.75, 1.0)
        assert row.split()[1:4] == [candidate["name"], f"{candidate['scale']:g}", f"{100 * candidate['gain']:+.1f}"]
    assert "next: pimerge tune\n" in result.err


def test_another_measure_of_examples_shows_its_score_and_the_bases(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "--measure", "label-cka")
    ranking = json.loads((folder / "ranking.json").read_text())
    *rows, last = result.out.splitlines()[1:]
    assert last.split()[1:] == ["(base)", f"{ranking['base_score']:.4f}", "–", "–"]
    for candidate, row in zip(ranking["candidates"], rows, strict=True):
        assert row.split()[1:3] == [candidate["name"], f"{candidate['score']:.4f}"]


def test_by_the_store_the_ranking_is_written_and_shown(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "parity", "-k", 1, *STORED)
    assert result.code == 0
    ranking = json.loads((folder / "ranking.json").read_text())
    assert {candidate["name"] for candidate in ranking["candidates"]} == {"a", "b"}
    assert ranking["selected"] == [ranking["candidates"][0]["name"]]
    for candidate in ranking["candidates"]:
        assert f"{candidate['score']:.4f}" in result.out
    assert "not comparable: its rank is 2, but the target has rank 4" in result.out
    assert "next: pimerge tune\n" in result.err


@pytest.mark.parametrize("measure", ["combined", "fisher"])
def test_json_is_the_ranking_itself(folder: Path, shell: Shell, measure: str) -> None:
    result = shell("rank", "--target", "parity", "--json", "--quiet", "--measure", measure)
    assert result.document == json.loads((folder / "ranking.json").read_text())
    assert result.err == ""


def test_a_target_may_be_given_by_folder(folder: Path, shell: Shell) -> None:
    by_name = shell("rank", "--target", "parity", "--json", *STORED).document
    assert shell("rank", "--target", "experts/parity/", "--json", *STORED).document == by_name
    assert shell("rank", "--target", folder / "experts" / "parity", "--json", *STORED).document == by_name


def test_an_unknown_target_suggests_the_nearest(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "partiy")
    assert result.code == 3
    assert result.out == ""
    assert "there is no target 'partiy'" in result.err
    assert "did you mean 'parity'?" in result.err
    assert not (folder / "ranking.json").exists()


def test_a_folder_outside_the_store_is_embedded_for_a_measure_of_the_store(folder: Path, shell: Shell) -> None:
    shutil.copytree(folder / "experts" / "a", folder / "outside" / "new")
    result = shell("rank", "--target", "outside/new", "--json", *STORED)
    assert result.code == 0
    assert "new is not in the store yet: embedding it" in result.err
    store = json.loads((folder / "embeddings.json").read_text())["experts"]
    assert store["new"]["settings"] == store["a"]["settings"]
    for part in ("diagonal", "marginals"):
        assert store["new"]["sidecars"][part]["sha256"] == store["a"]["sidecars"][part]["sha256"]
    assert result.document["candidates"][0]["name"] == "a"
    assert result.document["candidates"][0]["score"] == pytest.approx(1)


def test_a_folder_outside_with_a_name_of_the_store_is_another_expert(folder: Path, shell: Shell) -> None:
    shutil.copytree(folder / "experts" / "a", folder / "outside" / "b")
    result = shell("rank", "--target", "outside/b", *STORED)
    assert result.code == 3
    assert "has another expert named 'b'" in result.err
    by_examples = shell("rank", "--target", "outside/b", "--json").document
    assert by_examples["target"]["path"] == "outside/b"
    assert {candidate["name"] for candidate in by_examples["candidates"]} == set(NAMES)


def test_a_target_that_changed_says_to_embed_again(
    folder: Path, shell: Shell, make_expert: MakeExpert, vit_base: Path
) -> None:
    make_expert(folder / "experts" / "parity", vit_base, seed=9)
    result = shell("rank", "--target", "parity")
    assert result.code == 3
    assert "run 'pimerge embed' again" in result.err


def test_the_same_ranking_again_is_fine_and_another_needs_force(folder: Path, shell: Shell) -> None:
    assert shell("rank", "--target", "parity", *STORED).code == 0
    assert shell("rank", "--target", "parity", *STORED).code == 0
    refused = shell("rank", "--target", "a", *STORED)
    assert refused.code == 3
    assert "pass --force" in refused.err
    assert json.loads((folder / "ranking.json").read_text())["target"]["name"] == "parity"
    assert shell("rank", "--target", "a", "--force", *STORED).code == 0
    assert json.loads((folder / "ranking.json").read_text())["target"]["name"] == "a"


def test_another_measure_and_output(folder: Path, shell: Shell) -> None:
    line = ("rank", "--target", "parity", "--measure", "delta", "-k", 9, "--no-gate")
    result = shell(*line, "-o", "deep/r.json", "--json")
    assert {candidate["name"] for candidate in result.document["candidates"]} == {"a", "b", "other-rank"}
    assert {candidate["path"] for candidate in result.document["candidates"]} == {
        f"../experts/{name}" for name in ("a", "b", "other-rank")
    }
    assert "only 3 of the 9 experts asked for are comparable" in shell(*line).err


def test_nobody_to_compare_with_is_a_valid_answer(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "other-rank", *STORED)
    assert result.code == 0
    assert result.err.count("no expert of the store can be compared with other-rank") == 1
    assert json.loads((folder / "ranking.json").read_text())["selected"] == []


def test_a_task_alone_is_ranked_by_its_examples(folder: Path, shell: Shell) -> None:
    result = shell("rank", "--target", "tasks/new", "--json").document
    assert result["target"] == {**result["target"], "name": "new", "path": "tasks/new", "expert": False}
    assert {candidate["name"] for candidate in result["candidates"]} == set(NAMES)
    assert result["notes"][0] == "the target has no expert, so its examples alone decide"
    assert shell("rank", "--target", "tasks/new/task.json", "--json").document == result


def without_stranger(folder: Path) -> None:
    """The expert of another rank, which has no init in common with the others, leaves the store."""
    Store(folder / "embeddings.json").drop("other-rank")


def test_a_task_alone_is_ranked_by_fisher_at_the_pools_init_and_nothing_stays(folder: Path, shell: Shell) -> None:
    without_stranger(folder)
    before = (folder / "embeddings.json").read_bytes()
    result = shell("rank", "--target", "tasks/new", "--measure", "fisher-factors", "--no-gate", "--json")
    assert result.code == 0, result.err
    assert {candidate["path"] for candidate in result.document["candidates"]} == {
        f"experts/{name}" for name in ("parity", "a", "b")
    }
    assert "at the pool's init" in result.document["notes"][0]
    assert result.document["target"]["expert"] is False
    assert (folder / "embeddings.json").read_bytes() == before
    refused = shell("rank", "--target", "tasks/new", "--measure", "delta")
    assert refused.code == 3
    assert "pass --train-target" in refused.err


def test_a_target_may_be_trained_from_the_pools_init(folder: Path, shell: Shell) -> None:
    without_stranger(folder)
    line = ("rank", "--target", "tasks/new", "--measure", "parameters", "--json")
    first = shell(*line, "--train-target")
    assert first.code == 0, first.err
    assert first.document["target"] == {**first.document["target"], "path": "targets/new", "expert": True}
    assert {candidate["name"] for candidate in first.document["candidates"]} == {"parity", "a", "b"}
    assert first.document["not_comparable"] == []
    trained = (folder / "targets" / "new" / "adapter_model.safetensors").read_bytes()
    assert shell(*line, "--train-target", "--force").document == first.document
    assert shell(*line).document == first.document  # the task has an expert now
    assert (folder / "targets" / "new" / "adapter_model.safetensors").read_bytes() == trained
    by_itself = shell("rank", "--target", "tasks/new", "--train-target", "--json", "-o", "own.json").document
    assert by_itself["measure"] == "fisher"  # what it was trained for
    by_examples = shell("rank", "--target", "tasks/new", "--json", "-o", "other.json").document
    assert by_examples["measure"] == "combined"
    assert "new" not in {candidate["name"] for candidate in by_examples["candidates"]}


def test_without_readable_examples_an_expert_is_ranked_by_the_store_and_a_task_is_an_error(
    folder: Path, shell: Shell
) -> None:
    forget_the_data(folder)
    result = shell("rank", "--target", "parity", "--json")
    assert result.code == 0
    assert result.document["measure"] == "fisher"
    assert "there is no data file" in result.document["notes"][0]
    assert "ranked by 'fisher' from the store" in result.document["notes"][0]
    for line in (["parity", "--measure", "combined"], ["parity", "--shots", "2"], ["tasks/new"]):
        refused = shell("rank", "--force", "--target", *line)
        assert refused.code == 3
        assert "there is no data file" in refused.err


def test_few_examples_are_said_or_refused(folder: Path, shell: Shell, scans: tuple[list[Any], list[int]]) -> None:
    line = ("rank", "--target", "tasks/new", "--json", "--force")
    for labels, note in (([0, 1, 0, 0], None), ([0] * 8, "all 6 examples of")):
        set_labels(folder, "new", labels, scans)
        result = shell(*line)
        assert result.code == (3 if note else 0)
        assert note is None or note in result.err
    one_each = shell(*line, "--shots", 1)
    assert one_each.code == 3
    set_labels(folder, "new", [0, 1, 1, 0], scans)
    one_each = shell(*line, "--shots", 1)
    assert one_each.code == 0
    assert any("nothing can be held out" in note for note in one_each.document["notes"])
    assert all(c["low"] <= c["score"] <= c["high"] for c in one_each.document["candidates"])
    probe = shell(*line, "--shots", 1, "--measure", "probe")
    assert probe.code == 3
    assert "every class has one example" in probe.err
    assert shell(*line, "--shots", 2).code == 3


def test_a_candidate_that_is_gone_changed_or_not_finite_is_listed_and_the_others_are_ranked(
    folder: Path, shell: Shell, made: Path, make_expert: MakeExpert, vit_base: Path
) -> None:
    shutil.rmtree(folder / "experts" / "a")  # the first of the store
    make_expert(folder / "experts" / "b", vit_base, seed=9)
    path = make_expert(folder / "experts" / "huge", vit_base, folder / "tasks" / "old", seed=1)
    bases = Bases(torch.device("cpu"), torch.float32)
    store = Store(folder / "embeddings.json")
    embed_expert(open_expert(path), check_expert(open_expert(path)), store, EmbedSettings(max_examples=8), bases)
    edit_tensors(path, lambda tensors: [t.fill_(3e38) for key, t in tensors.items() if "lora_B" in key])
    store.document.experts["huge"].sha256 = open_expert(path).sha256
    (folder / "embeddings.json").write_text(store.document.model_dump_json())
    result = shell("rank", "--target", "tasks/new", "--json").document
    reasons = {other["name"]: other["reason"] for other in result["not_comparable"]}
    assert reasons.keys() == {"a", "b", "huge"}
    assert "is gone" in reasons["a"]
    assert "has changed since it was embedded" in reasons["b"]
    assert "NaN or Inf" in reasons["huge"]
    assert {candidate["name"] for candidate in result["candidates"]} == {"parity", "other-rank"}


def test_a_pool_of_one_and_of_two(folder: Path, shell: Shell) -> None:
    store = Store(folder / "embeddings.json")
    store.drop("other-rank")
    store.drop("b")
    for measure in ("combined", "fisher"):
        pair = shell("rank", "--target", "parity", "--json", "--force", "--measure", measure).document
        assert [candidate["name"] for candidate in pair["candidates"]] == ["a"]
    store.drop("a")
    for measure in ("combined", "fisher"):
        alone = shell("rank", "--target", "parity", "--json", "--force", "--measure", measure)
        assert alone.code == 0
        assert (alone.document["candidates"], alone.document["selected"]) == ([], [])
    assert shell("rank", "--calibrate").code == 3


def test_several_bases_ask_for_one_and_the_others_experts_are_not_comparable(
    folder: Path, shell: Shell, make_expert: MakeExpert, vit_base: Path
) -> None:
    other = shutil.copytree(vit_base, folder / "vit-other")
    edit = {"base_model_name_or_path": str(other)}
    (other / "model.safetensors").unlink()
    shutil.copy(folder / "experts" / "a" / "adapter_model.safetensors", other / "model.safetensors")  # any content
    path = make_expert(folder / "experts" / "stranger", vit_base, folder / "tasks" / "old", seed=1)
    store = Store(folder / "embeddings.json")
    bases = Bases(torch.device("cpu"), torch.float32)
    embed_expert(open_expert(path), check_expert(open_expert(path)), store, EmbedSettings(max_examples=8), bases)
    write_json(path / "adapter_config.json", json.loads((path / "adapter_config.json").read_text()) | edit)
    entry = store.document.experts["stranger"]
    entry.base = open_expert(path).base.identity
    from pimerge.core.files import sha256_file

    entry.config_sha256 = sha256_file(path / "adapter_config.json")
    (folder / "embeddings.json").write_text(store.document.model_dump_json())
    refused = shell("rank", "--target", "tasks/new")
    assert refused.code == 3
    assert "have 2 different bases" in refused.err
    assert "pass the target's base: --base" in refused.err
    result = shell("rank", "--target", "tasks/new", "--base", vit_base, "--json").document
    assert {candidate["name"] for candidate in result["candidates"]} == set(NAMES)
    (reason,) = result["not_comparable"]
    assert reason["name"] == "stranger"
    assert "another model than the target's" in reason["reason"]


def test_heads_that_are_missing_are_named_one_by_one(
    folder: Path, shell: Shell, make_expert: MakeExpert, vit_base: Path
) -> None:
    result = shell("rank", "--target", "tasks/new", "--measure", "loss", "--json").document
    assert result["candidates"] == []  # theirs are for other labels, and the target has no head
    assert {other["name"] for other in result["not_comparable"]} == set(NAMES)
    assert all("no head has the target's labels" in other["reason"] for other in result["not_comparable"])
    leep = shell("rank", "--target", "tasks/new", "--measure", "leep", "--json", "-o", "leep.json").document
    assert {candidate["name"] for candidate in leep["candidates"]} == set(NAMES)


def test_an_explanation_has_the_parts_of_each_scale_and_tensor_and_writes_nothing(folder: Path, shell: Shell) -> None:
    by_examples = shell("rank", "--target", "parity", "--explain", "a", "--json").document
    assert list(by_examples["by_scale"]) == ["0.25", "0.5", "0.75", "1.0"]
    candidate = by_examples["candidate"]
    best = by_examples["by_scale"][str(candidate["scale"])]
    assert best["expected gain"] == pytest.approx(candidate["gain"], abs=1e-9)
    assert best.keys() == {"likelihood", "expected gain"}
    assert by_examples["measure"] == "fisher"

    for target in ("parity", "tasks/new"):
        if target == "tasks/new":
            without_stranger(folder)
        stored = shell("rank", "--target", target, "--explain", "a", "--measure", "fisher", "--json").document
        assert stored["by_scale"] == {}
        assert sum(stored["by_tensor"].values()) == pytest.approx(stored["candidate"]["score"])
    assert not (folder / "ranking.json").exists()
    table = shell("rank", "--target", "parity", "--explain", "a").out
    assert "scale" in table
    assert "adds to 'fisher'" in table
    unknown = shell("rank", "--target", "parity", "--explain", "partiy")
    assert unknown.code == 3
    assert "there is no candidate 'partiy'" in unknown.err
    excluded = shell("rank", "--target", "b", "--measure", "fisher-raw", "--explain", "parityy")
    assert "'parity'" in excluded.err


def test_with_fewer_shots_than_the_targets_expert_saw_the_store_counts_too(folder: Path, shell: Shell) -> None:
    few = ["rank", "--target", "parity", "--shots", "2"]  # its expert was embedded with four of each class
    ranking = shell(*few, "--json").document
    assert "its expert in the store saw more examples" in ranking["notes"][0]
    found = shell(*few, "--explain", "a", "--json").document
    similarity = sum(found["by_tensor"].values())
    for scale, parts in found["by_scale"].items():
        assert parts["store"] == pytest.approx(float(scale) * 1.3 * (1 / 2 - 1 / 4) * similarity)
        assert parts["expected gain"] == pytest.approx(0.6 * parts["likelihood"] + parts["store"])
    candidate = next(each for each in ranking["candidates"] if each["name"] == "a")
    assert candidate["gain"] == pytest.approx(max(parts["expected gain"] for parts in found["by_scale"].values()))
    all_of_them = shell("rank", "--target", "parity", "--json", "--force").document
    assert not any("saw more examples" in note for note in all_of_them["notes"])


def test_a_calibrated_store_ranks_by_history(folder: Path, shell: Shell) -> None:
    shutil.rmtree(folder / "experts" / "b")
    calibrated = shell("rank", "--calibrate", "--json")
    assert calibrated.code == 0, calibrated.err
    assert "left out: 'b'" in calibrated.err
    gains = calibrated.document["gains"]
    assert {target: set(sources) for target, sources in gains.items()} == {
        name: {"parity", "a", "other-rank"} - {name} for name in ("parity", "a", "other-rank")
    }
    assert all(by_scale.keys() == {"0.25", "0.5", "0.75", "1.0"} for row in gains.values() for by_scale in row.values())
    before = (folder / "embeddings.json").read_bytes()
    again = shell("rank", "--calibrate")
    assert (folder / "embeddings.json").read_bytes() == before
    assert f"{100 * max(gains['a']['parity'].values()):+.1f}" in again.out

    result = shell("rank", "--target", "tasks/new", "--measure", "history", "--no-gate", "--json").document
    means = {
        source: max(
            sum(row[source][scale] for row in gains.values() if source in row) / 2
            for scale in ("0.25", "0.5", "0.75", "1.0")
        )
        for source in ("parity", "a", "other-rank")
    }
    assert {candidate["name"]: candidate["score"] for candidate in result["candidates"]} == pytest.approx(means)


def test_a_task_that_changed_since_it_was_embedded_is_not_calibrated(folder: Path, shell: Shell) -> None:
    old = folder / "tasks" / "old" / "train.parquet"
    shutil.copy(folder / "tasks" / "new" / "train.parquet", old)
    result = shell("rank", "--calibrate")
    assert result.code == 3
    assert "its task has changed since it was embedded" in result.err


def test_the_measures_are_listed_with_what_they_need(shell: Shell) -> None:
    listed = {row["measure"]: row["needs"] for row in shell("rank", "--measures", "--json").document}
    assert listed["combined"] == "a few labelled examples of the target"
    assert "head" in listed["leep"]
    assert "at least 2 of a class" in listed["probe"]
    assert "--calibrate" in listed["history"]
    assert listed["fisher"] == "the store"
    table = shell("rank", "--measures").out
    assert all(name in table for name in listed)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--target", "parity", "-k", "0"], 3, "-k is '0'"),
        (["--target", "parity", "-k", "two"], 3, "expected a positive integer or auto"),
        (["--target", "parity", "--measure", "fihser"], 3, "'fisher'"),
        (["--target", "parity", "--store", "nowhere.json"], 3, "'nowhere.json'"),
        (["--target", "parity", "--shots", "99"], 3, "99 were asked for"),
        (["--target", "parity", "--measure", "history"], 3, "run 'pimerge rank --calibrate' first"),
        (["--target", "parity", "--examples", "1"], 2, "--examples"),
        ([], 3, "the target is not given"),
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
