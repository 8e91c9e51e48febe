"""``pimerge.evaluate``: what is scored may be paths or opened, the target a path, an expert, a task or rows."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.evaluation.evaluate import Evaluation, evaluate
from pimerge.evaluation.scoring import score_experts
from pimerge.merging.merge import merge
from pimerge.tasks.task import open_task
from tests.support.experts import MakeExpert


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> dict[str, Path]:
    """Two experts and the full checkpoint of a base without a head for the task."""
    folder = tmp_path_factory.mktemp("evaluate")
    return {name: make_expert(folder / name, bert_base, text_task, seed=seed) for seed, name in enumerate("xa")}


@pytest.fixture(scope="module")
def by_path(pool: dict[str, Path]) -> Evaluation:
    return evaluate([str(pool["a"]), pool["x"]], target=pool["x"])


def test_the_scores_are_in_the_order_given(pool: dict[str, Path], by_path: Evaluation) -> None:
    x, a = open_expert(pool["x"]), open_expert(pool["a"])
    assert by_path.scores == score_experts([a, x], open_task(x.path), x.base, x)
    assert [score.name for score in by_path] == ["(base)", "a", "x"]
    assert by_path["a"] == by_path.scores[1]
    assert by_path.target == "x"


def test_experts_and_the_target_may_be_opened(pool: dict[str, Path], by_path: Evaluation) -> None:
    x, a = open_expert(pool["x"]), open_expert(pool["a"])
    assert evaluate([a, x], target=x).to_dict() == by_path.to_dict()
    assert evaluate(a, target=x).scores == by_path.scores[:2]


def test_a_task_has_no_expert_whose_head_the_base_could_take(pool: dict[str, Path], by_path: Evaluation) -> None:
    assert evaluate([pool["a"], pool["x"]], target=open_task(pool["x"])).scores == by_path.scores[1:]


def test_the_target_may_be_rows(pool: dict[str, Path], by_path: Evaluation) -> None:
    task = open_task(pool["x"])
    classes = datasets.ClassLabel(names=task.labels)
    train, test = (task.rows(role)[0].cast_column("label", classes) for role in ("train", "test"))
    found = evaluate([pool["a"]], target=train, test=test)
    assert found.scores == by_path.scores[1:2]
    with pytest.raises(PimergeError, match="test rows were given for a target that is not given as rows"):
        evaluate([pool["a"]], target=task, test=test)


def test_problems_of_all_experts_are_told_at_once(pool: dict[str, Path]) -> None:
    with pytest.raises(PimergeError) as error:
        evaluate([pool["a"], "nowhere/1", "nowhere/2"], target=pool["x"])
    assert all(name in str(error.value) for name in ("nowhere/1", "nowhere/2"))


def test_a_merge_is_scored_once_it_is_saved(pool: dict[str, Path], by_path: Evaluation, tmp_path: Path) -> None:
    merged = merge([pool["a"]], target=pool["x"], output=None)
    with pytest.raises(PimergeError, match="the merge is not saved"):
        evaluate(merged, target=pool["x"])
    merged.save(tmp_path / "merged")
    found = evaluate([merged], target=pool["x"])
    assert [score.name for score in found] == ["(base)", "merged"]
