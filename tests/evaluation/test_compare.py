"""``pimerge.compare`` on opened experts and rows in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.errors import PimergeError
from pimerge.evaluation.compare import compare
from pimerge.evaluation.comparison import Comparison
from pimerge.tasks.task import Task, open_task
from tests.support.experts import MakeExpert


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> list[Expert]:
    folder = tmp_path_factory.mktemp("compare") / "experts"
    return [open_expert(make_expert(folder / name, bert_base, text_task, seed=i)) for i, name in enumerate("xyz")]


def test_rows_and_paths_give_the_same_runs(pool: list[Expert], tmp_path: Path) -> None:
    task = open_task(pool[0].path)
    rows = Task.from_rows({role: task.rows(role)[0] for role in ("train", "test")}, labels=task.labels)
    quick = {"shots": [4], "seeds": 1, "epochs": 1, "methods": ["learned"], "controls": ["head"], "rank_by": "ranking"}
    first = compare(pool[0].path, experts=pool, output=tmp_path / "a.json", **quick)  # type: ignore[arg-type]
    other = compare(rows, experts=pool[1:], output=tmp_path / "b.json", **quick)  # type: ignore[arg-type]
    assert first is not None
    assert other is not None
    assert first.to_dict() == json.loads((tmp_path / "a.json").read_text())
    assert {file.suffix for file in tmp_path.glob("a.*")} == {".json", ".md", ".csv", ".runs"}
    assert [(run.method, run.experts) for run in first.runs] == [("head", []), ("learned", ["y", "z"])]
    assert [run.scores for run in other.runs] == [run.scores for run in first.runs]
    before = (tmp_path / "a.csv").read_bytes()
    slower = [run.model_copy(update={"seconds": run.seconds + 1}) for run in first.runs]
    Comparison(first.document.model_copy(update={"runs": slower})).save(tmp_path / "a.json")  # the seconds do not count
    assert (tmp_path / "a.csv").read_bytes() == before
    better = [run.model_copy(update={"losses": {"test": 0.0}}) for run in first.runs]
    with pytest.raises(PimergeError, match=r"a\.json' already exists"):
        Comparison(first.document.model_copy(update={"runs": better})).save(tmp_path / "a.json")
    with pytest.raises(PimergeError, match=r"a\.json' already exists"):
        compare(pool[0].path, experts=pool, output=tmp_path / "a.json", **{**quick, "seeds": 2})  # type: ignore[arg-type]


def test_an_output_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"the output must end in \.json"):
        compare(output=tmp_path / "comparison.md")


def test_a_selection_of_learning_rates_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="--select must be fixed or cv; got 'x'"):
        compare(output=tmp_path / "c.json", select="x")
