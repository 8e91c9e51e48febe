"""The command ``pimerge tune``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.tasks.task import open_task
from tests.support.cli import Finished, Shell
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import relative_difference
from tests.support.tasks import write_json

NAMES = ("x", "a", "b")
SCORES = {"a": 0.8, "b": 0.1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path) -> Path:
    """Experts and a ranking that selects a and b for x."""
    return ranked_pool(tmp_path_factory.mktemp("made"), make_expert, vit_base, parity_task)


def ranked_pool(folder: Path, make_expert: MakeExpert, base: Path, task: Path) -> Path:
    for seed, name in enumerate(NAMES):
        make_expert(folder / "experts" / name, base, task, seed=seed)

    def reference(name: str) -> dict[str, str]:
        return {"name": name, "path": f"experts/{name}", "sha256": open_expert(folder / "experts" / name).sha256}

    ranking = Ranking(
        target=Target(**reference("x")),
        measure="fisher",
        k=2,
        selected=["a", "b"],
        why="a test",
        candidates=[Candidate(**reference(name), score=s, low=s, high=s) for name, s in SCORES.items()],
        not_comparable=[],
    )
    write_json(folder / "ranking.json", ranking.model_dump())
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """./experts and ./ranking.json, as deep as they were made."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def tune(shell: Shell, folder: Path) -> Shell:
    """``pimerge tune`` for an epoch on a few examples."""

    def run(*arguments: object) -> Finished:
        return shell("tune", "--epochs", 1, "--shots", 4, *arguments)

    return run


def start_of(folder: Path, output: str = "tuned") -> list[float]:
    """The logits that the weights started from."""
    start: list[float] = json.loads((folder / output / "pimerge.json").read_text())["options"]["start"]
    return start


def test_the_selected_experts_are_composed_and_the_weights_start_from_their_scores(tune: Shell, folder: Path) -> None:
    result = tune()
    assert result.code == 0
    assert start_of(folder) == pytest.approx([0.8, 0.1])
    assert "weight of a" in result.out
    assert "next: pimerge eval tuned" in result.err
    assert [input_["name"] for input_ in json.loads((folder / "tuned/pimerge.json").read_text())["inputs"]] == [
        "a",
        "b",
    ]
    assert open_expert(folder / "tuned").name == "tuned"


def test_json_is_one_document_that_says_what_was_done(tune: Shell, folder: Path) -> None:
    result = tune("--json", "--quiet", "--method", "interpolated")
    document = result.document
    assert result.err == ""
    assert document["output"] == "tuned"
    assert document["method"] == "interpolated"
    assert document["experts"] == ["x", "a", "b"]
    coefficients = json.loads((folder / "tuned/coefficients.json").read_text())
    assert document["weights"] == coefficients["weights"]
    assert document["rank"] == max(open_expert(folder / "tuned").ranks)
    assert document["examples"] == 6  # 2 × 4 shots, a quarter of each class held out


def test_an_equal_start_ignores_the_scores(tune: Shell, folder: Path) -> None:
    tune("--start", "equal")
    assert start_of(folder) == [0, 0]


def test_experts_given_replace_those_of_the_ranking_and_keep_their_scores(tune: Shell, folder: Path) -> None:
    tune("experts/b", "experts/a")
    assert start_of(folder) == pytest.approx([0.1, 0.8])


def test_methods_without_experts_take_none(tune: Shell, folder: Path) -> None:
    refused = tune("experts/a", "--method", "scratch")
    assert refused.code == 3
    assert "'scratch' combines no experts, and 1 were given" in refused.err
    assert tune("--method", "scratch", "--json").document["experts"] == ["fresh"]
    assert open_expert(folder / "tuned").ranks == (4,)
    assert not (folder / "tuned" / "coefficients.json").exists()


def test_a_task_without_an_expert_can_be_the_target(tune: Shell, folder: Path, parity_task: Path) -> None:
    (folder / "ranking.json").unlink()
    result = tune("experts/a", "experts/b", "--method", "interpolated", "--target", parity_task, "--json")
    assert result.code == 0
    assert result.document["experts"] == ["fresh", "a", "b"]
    assert "a fresh one takes its place" in result.err


def change_ranking(folder: Path, **fields: Any) -> dict[str, Any]:
    """Change fields of the ranking; ``scales`` go into its candidates."""
    ranking: dict[str, Any] = json.loads((folder / "ranking.json").read_text())
    for candidate, scale in zip(ranking["candidates"], fields.pop("scales", []), strict=False):
        candidate["scale"] = scale
    write_json(folder / "ranking.json", ranking | fields)
    return ranking


def rank_task(folder: Path, task: Path, **fields: Any) -> None:
    """Make the ranking one for a task without an expert."""
    path = os.path.relpath(task, folder)
    target = Target(name=task.name, path=path, sha256=open_task(task).sha256(), expert=False)
    change_ranking(folder, target=target.model_dump(), **fields)


def options_of(folder: Path) -> Any:
    """The options in the output's manifest."""
    return json.loads((folder / "tuned" / "pimerge.json").read_text())["options"]


@pytest.mark.parametrize("method", ["uniform", "learned"])
def test_experts_of_the_ranking_are_tuned_at_its_scales_and_merge_so_again(
    tune: Shell, shell: Shell, folder: Path, method: str
) -> None:
    change_ranking(folder, scales=[0.5, 0.25])
    result = tune("--method", method)
    assert result.code == 0, result.err
    assert "at scale 0.5" in result.out
    coefficients = json.loads((folder / "tuned/coefficients.json").read_text())
    assert coefficients["scales"] == options_of(folder)["scales"] == [0.5, 0.25]
    a, b = (dense_deltas(open_expert(folder / "experts" / name)) for name in "ab")
    found = dense_deltas(open_expert(folder / "tuned"))
    for name, (first, second) in coefficients["weights"].items():
        assert relative_difference(found[name], 0.5 * first * a[name] + 0.25 * second * b[name]) < 1e-5
    assert shell("merge", "--coefficients", "tuned/coefficients.json").code == 0
    for name, delta in dense_deltas(open_expert(folder / "merged")).items():
        assert relative_difference(delta, found[name]) < 1e-5


def test_experts_that_are_named_are_tuned_as_they_are(tune: Shell, folder: Path) -> None:
    change_ranking(folder, scales=[0.5, 0.25])
    assert tune("experts/a", "experts/b", "--json").document["scales"] == [1.0, 1.0]


@pytest.mark.parametrize("method", ["learned", "uniform", "interpolated"])
def test_where_no_expert_is_expected_to_help_a_fresh_one_is_trained(tune: Shell, folder: Path, method: str) -> None:
    change_ranking(folder, selected=[])
    result = tune("--method", method, "--json", "--quiet")
    assert result.code == 0, result.err
    assert result.err == ("warning: no expert is expected to help (ranking.json): training a fresh expert instead\n")
    assert (result.document["method"], result.document["experts"]) == ("scratch", ["fresh"])
    assert (options_of(folder)["method"], options_of(folder)["instead_of"]) == ("scratch", method)
    instead = (folder / "tuned" / "adapter_model.safetensors").read_bytes()
    assert tune("--method", "scratch", "--force").code == 0
    assert (folder / "tuned" / "adapter_model.safetensors").read_bytes() == instead
    assert "instead_of" not in options_of(folder)


def test_a_fresh_one_for_texts_learns_from_the_names_of_the_classes(
    shell: Shell, make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    ranked_pool(tmp_path, make_expert, bert_base, text_task)
    change_ranking(tmp_path, selected=[])
    tune = ("tune", "--epochs", 1, "--shots", 4)
    result = shell(*tune, "--class-names")
    assert result.code == 0, result.err
    assert "the names of the 2 classes are used as one more training example of each" in result.err
    assert "10 examples" in result.out
    options = options_of(tmp_path)
    assert (options["method"], options["instead_of"], options["class_names"]) == ("named", "guided", True)
    assert options["holdout"] == 0
    assert shell(*tune, "--no-class-names", "--force").code == 0
    assert (options_of(tmp_path)["method"], options_of(tmp_path)["class_names"]) == ("named", False)
    assert shell(*tune, "--method", "learned", "--force").code == 0
    assert (options_of(tmp_path)["method"], options_of(tmp_path)["class_names"]) == ("scratch", False)


def test_names_of_classes_are_no_images(tune: Shell, folder: Path) -> None:
    result = tune("--class-names")
    assert result.code == 3
    assert "have no names that are texts like its examples" in result.err
    assert not (folder / "tuned").exists()


def test_experts_that_are_named_are_tuned_though_none_is_expected_to_help(tune: Shell, folder: Path) -> None:
    change_ranking(folder, selected=[])
    assert tune("experts/a", "--method", "uniform", "--json").document["experts"] == ["a"]


def test_the_ranking_of_a_task_names_its_data_and_the_experts(tune: Shell, folder: Path, parity_task: Path) -> None:
    rank_task(folder, parity_task, scales=[0.5, 1.0])
    result = tune("--method", "interpolated", "--json")
    assert result.code == 0, result.err
    assert (result.document["experts"], result.document["scales"]) == (["fresh", "a", "b"], [1.0, 0.5, 1.0])
    assert options_of(folder)["target"] == "parity"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_fresh_expert_for_a_task_is_like_the_pool(
    tune: Shell, folder: Path, parity_task: Path, by_name: bool
) -> None:
    rank_task(folder, parity_task, selected=[])
    result = tune(*([] if by_name else ["--target", parity_task]))
    assert result.code == 0, result.err
    fresh, a = open_expert(folder / "tuned"), open_expert(folder / "experts" / "a")
    assert (fresh.ranks, fresh.modules.keys()) == (a.ranks, a.modules.keys())
    assert options_of(folder)["fresh_rank"] is None


def test_a_task_that_changed_since_it_was_ranked_is_refused(tune: Shell, folder: Path, parity_task: Path) -> None:
    task = Path(shutil.copytree(parity_task, folder / "task"))
    rank_task(folder, task)
    with (task / "task.json").open("a") as file:
        file.write("\n")  # means the same
    assert tune("--method", "head").code == 0
    (task / "train.parquet").write_bytes((task / "test.parquet").read_bytes())
    result = tune("--force")
    assert result.code == 3
    assert "the task 'task' or its data has changed since 'ranking.json' was written" in result.err
    assert "run 'pimerge rank --target task' again" in result.err


def test_a_rank_cuts_the_result(tune: Shell, folder: Path) -> None:
    document = tune("--rank", 2, "--json").document
    assert document["rank"] == 2
    assert 0 < document["truncation"] < 1
    assert open_expert(folder / "tuned").ranks == (2,)


def test_an_output_that_is_there_needs_force(tune: Shell, folder: Path) -> None:
    tune()
    before = (folder / "tuned" / "adapter_model.safetensors").read_bytes()
    refused = tune("--seed", 1)
    assert refused.code == 3
    assert "pass --force" in refused.err
    assert (folder / "tuned" / "adapter_model.safetensors").read_bytes() == before
    assert tune("--seed", 1, "--force").code == 0
    assert (folder / "tuned" / "adapter_model.safetensors").read_bytes() != before


def test_an_expert_that_changed_since_it_was_ranked_is_refused(
    tune: Shell, folder: Path, make_expert: MakeExpert, vit_base: Path
) -> None:
    make_expert(folder / "experts" / "a", vit_base, seed=9)
    result = tune()
    assert result.code == 3
    assert "has changed since 'ranking.json' was written" in result.err


def test_another_target_than_the_rankings_needs_experts(tune: Shell) -> None:
    result = tune("--target", "experts/a")
    assert result.code == 3
    assert "ranks experts for 'x', not for 'experts/a'" in result.err


def test_what_any_method_wrote_is_scored_in_the_order_asked(tune: Shell, shell: Shell, folder: Path) -> None:
    assert tune("--method", "full", "--output", "full").code == 0
    assert tune("--method", "ensemble", "--output", "together").code == 0
    assert tune().code == 0
    result = shell("eval", "together/", "tuned", "full/", "--json")
    assert result.code == 0, result.err
    assert [row["name"] for row in result.document["scores"]] == ["(base)", "together", "tuned", "full"]
    notes = {row["name"]: row["note"] for row in result.document["scores"]}
    assert (notes["together"], notes["full"]) == ("3 experts together", "a full checkpoint")


def test_the_methods_are_listed_with_their_options(shell: Shell) -> None:
    listed = {method["name"]: method for method in shell("tune", "--methods", "--json").document}
    assert {"learned", "full", "distill"} <= listed.keys()
    assert listed["distill"]["options"] == {"teacher": "mean", "label_share": 0.5, "unlabelled": 500}
    assert "arXiv 2402.15414" in shell("tune", "--methods").out


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--method", "lerned"], 3, ["did you mean 'learned'?"]),
        (["--start", "zero"], 3, ["--start must be ranking or equal; got 'zero'"]),
        (["--rank", "none"], 3, ["--rank is 'none'"]),
        (["--teacher", "mean", "--runs", "3"], 3, ["no option --teacher", "it is for distill", "no option --runs"]),
        (["--select", "best"], 3, ["--select must be fixed or cv; got 'best'"]),
        (["--sam", "0", "--ema", "1", "--decay-towards", "x"], 3, ["--sam must", "--ema must", "--decay-towards must"]),
        (
            ["--lr", "0", "--holdout", "1", "--granularity", "x"],
            3,
            ["--lr must", "--holdout must", "--granularity"],
        ),
        (["--ranking", "nowhere.json"], 3, ["there is no ranking 'nowhere.json'"]),
        (["--dtype", "half"], 3, ["got 'half'"]),
        (["nowhere/1", "nowhere/2/x"], 3, ["nowhere/1", "nowhere/2/x"]),
        (["--batch-size", "many"], 2, ["--batch-size"]),
    ],
)
def test_wrong_input_ends_with_its_code_and_a_message(
    tune: Shell, folder: Path, arguments: list[str], code: int, expected: list[str]
) -> None:
    result = tune(*arguments)
    assert result.code == code
    assert result.out == ""
    assert all(part in result.err for part in expected)
    assert "Traceback" not in result.err
    assert not (folder / "tuned").exists()
