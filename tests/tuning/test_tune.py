"""``pimerge.tune`` as a function: what it takes for experts, targets and options, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.tune import tune
from tests.support.bases import model_for
from tests.support.experts import MakeExpert
from tests.support.numerics import logits_of

BRIEF = TrainingOptions(epochs=1, shots=4)


@pytest.fixture(scope="module")
def experts(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> dict[str, Expert]:
    """x, a and b; not to be changed."""
    folder = tmp_path_factory.mktemp("experts")
    made = {name: make_expert(folder / name, bert_base, text_task, seed=seed) for seed, name in enumerate("xab")}
    return {name: open_expert(path) for name, path in made.items()}


@pytest.fixture
def ranking(experts: dict[str, Expert]) -> Ranking:
    """A ranking for x in memory, of which a is selected, beside the experts."""

    def reference(name: str) -> dict[str, str]:
        return {"name": name, "path": name, "sha256": experts[name].sha256}

    found = Ranking(
        target=Target(**reference("x")),
        measure="fisher",
        k=1,
        selected=["a"],
        why="a test",
        candidates=[Candidate(**reference(name), score=0.5, low=0.5, high=0.5) for name in "ab"],
        not_comparable=[],
    )
    return found.at(experts["x"].path.parent / "ranking.json")


def rows_of(task: Path) -> list[dict[str, Any]]:
    """The training rows of a task, labelled by the names of classes."""
    opened = open_task(task)
    table, labels = opened.rows("train")
    return [{"text": row["text"], "label": opened.labels[label]} for row, label in zip(table, labels, strict=True)]


TARGETS: dict[str, Callable[[Expert, Path], Any]] = {
    "an expert": lambda x, task: x,
    "the path of an expert": lambda x, task: x.path,
    "a task": lambda x, task: open_task(task),
    "the path of a task": lambda x, task: str(task),
    "a list of dicts": lambda x, task: rows_of(task),
    "a data set": lambda x, task: Dataset.from_list(rows_of(task)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_of_every_form_are_learned(
    experts: dict[str, Expert], text_task: Path, tmp_path: Path, target: str
) -> None:
    given = TARGETS[target](experts["x"], text_task)
    chosen = [experts["a"], experts["b"].path]
    result = tune(
        chosen, target=given, method="learned", ranking=tmp_path / "none", output=tmp_path / "tuned", options=BRIEF
    )
    assert result.experts == ["a", "b"]
    assert open_expert(result.output).head.keys() == {"classifier.weight", "classifier.bias"}
    assert sorted(open_task(result.output).labels) == sorted(open_task(text_task).labels)


def test_a_ranking_in_memory_names_target_and_experts(ranking: Ranking, tmp_path: Path) -> None:
    result = tune(ranking, method="interpolated", output=tmp_path / "tuned", epochs=1, shots=4)
    assert result.experts == ["x", "a"]


def test_a_task_that_was_not_ranked_is_refused(ranking: Ranking, text_task: Path, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="ranks experts for 'x', not for"):
        tune(ranking, target=open_task(text_task), output=tmp_path / "tuned")


def test_keywords_are_training_options_or_the_methods_own(
    experts: dict[str, Expert], text_task: Path, tmp_path: Path
) -> None:
    def run(**keywords: Any) -> None:
        tune([experts["a"]], target=text_task, output=tmp_path / "tuned", ranking=tmp_path / "none", **keywords)

    with pytest.raises(PimergeError, match="--epochs must be a positive number; got 0"):
        run(options=BRIEF, epochs=0)
    with pytest.raises(PimergeError, match="--runs must be at least 2; got 1"):
        run(method="soup", runs=1)
    with pytest.raises(PimergeError, match="'learned' has no option --runs"):
        run(method="learned", runs=3)


def test_what_is_loaded_answers_as_what_was_trained(
    experts: dict[str, Expert], text_task: Path, bert_base: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    base = find_base(str(bert_base), None, tmp_path)
    result = tune(
        method="scratch", target=text_task, base=base, output=tmp_path / "tuned", options=BRIEF, note=said.append
    )
    assert (result.method, result.to_dict()["output"]) == ("scratch", str(tmp_path / "tuned"))
    ids = torch.randint(4, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    loaded = result.load(model_for(bert_base)).eval()
    assert logits_of(loaded, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (3, 2)


def test_a_checkpoint_is_not_loaded_as_an_adapter(text_task: Path, bert_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    result = tune(method="full", target=text_task, base=str(bert_base), output=output, options=BRIEF)
    with pytest.raises(PimergeError, match="of the method 'full' is not one adapter"):
        result.load(model_for(bert_base))
