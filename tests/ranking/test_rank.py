"""The functions ``embed`` and ``rank`` of the Python API, with paths, open objects and rows in memory."""

from __future__ import annotations

import shutil
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Ranking, read_ranking
from pimerge.core.errors import PimergeError
from pimerge.embedding.embed import EmbedResult, embed
from pimerge.ranking.rank import explain, rank
from pimerge.ranking.target import RankRequest
from pimerge.tasks.task import Task, open_task
from tests.support.experts import MakeExpert

NAMES = ("a", "b", "c")
SEEN = 12


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> Path:
    """Three experts, embedded."""
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(NAMES):
        make_expert(folder / "experts" / name, bert_base, text_task, seed=seed)
    embed(folder / "experts", store=folder / "embeddings.json", examples=SEEN)
    return folder


@pytest.fixture
def pool(template: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the experts and their store."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


def test_the_options_of_a_request_are_the_keywords_of_rank() -> None:
    keywords = {name: each for name, each in signature(rank).parameters.items() if name != "target"}
    assert list(keywords) == [field.name for field in fields(RankRequest)]
    assert [each.default for each in keywords.values()] == [field.default for field in fields(RankRequest)]


def test_experts_are_embedded_from_a_pool_paths_or_open(pool: Path) -> None:
    again = embed(examples=SEEN)
    assert (again.stored, again.computed, again.skipped, list(again.experts)) == (3, [], [], list(NAMES))
    mixed: list[str | Path | Expert] = [pool / "experts" / "a", open_expert("experts/b")]
    one = embed(mixed, store=Path("other.json"), examples=SEEN)
    assert one.computed == ["a", "b"]
    assert {name: entry.norm for name, entry in one.experts.items()} == {
        name: again.experts[name].norm for name in ("a", "b")
    }
    assert one.to_dict()["store"] == "other.json"


def test_an_expert_without_a_task_is_embedded_by_rows_in_memory(pool: Path) -> None:
    def embedded(name: str, **options: object) -> EmbedResult:
        return embed("experts/a", store=f"{name}.json", examples=SEEN, **options)  # type: ignore[arg-type]

    task = open_task("experts/a")
    known = embedded("known").experts["a"]
    rows, labels = task.rows("train")
    (pool / "experts" / "a" / "task.json").unlink()
    with pytest.raises(PimergeError, match=r"task\.json"):
        embedded("none")
    found = embedded("rows", task=task).experts["a"]
    assert found.norm == known.norm
    assert len(rows) == len(labels)


@pytest.mark.parametrize("measure", ["auto", "fisher"])
def test_a_target_is_a_name_a_path_or_an_open_expert(pool: Path, measure: str) -> None:
    path = Path("experts/a")
    by_name, by_path, by_expert = (
        rank(target, measure=measure, gate=False, examples=SEEN) for target in ("a", path, open_expert(path))
    )
    assert by_name == by_path == by_expert
    assert set(by_name.selected) == {"b", "c"}
    assert by_name.target.path == "experts/a"


def test_rows_in_memory_rank_like_their_task(pool: Path, text_task: Path) -> None:
    opened = open_task(text_task)
    found, labels = opened.rows("train")
    rows = [{"text": row["text"], "label": opened.labels[label]} for row, label in zip(found, labels, strict=True)]
    in_memory, by_folder = (
        rank(task, gate=False, examples=SEEN) for task in (Task.from_rows(rows, labels=opened.labels), text_task)
    )
    assert in_memory.candidates == by_folder.candidates
    assert not in_memory.target.expert
    plain = rank(rows, gate=False, examples=SEEN)
    assert plain.seen is not None
    assert plain.seen.per_class.keys() == set(opened.labels)


def test_a_ranking_saves_itself_with_paths_relative_to_its_file(pool: Path) -> None:
    ranking = rank("a", measure="delta", gate=False)
    written = ranking.save("deep/ranking.json")
    again = read_ranking(Path("deep/ranking.json"))
    assert again == written
    assert again.to_dict() == written.to_dict()
    assert [each.path for each in again.candidates] == [f"../{each.path}" for each in ranking.candidates]
    assert again.save("ranking.json").to_dict() == ranking.to_dict()
    assert isinstance(again, Ranking)


def test_the_tensors_of_an_explanation_add_up_to_the_score(pool: Path) -> None:
    found = explain("a", "b", RankRequest(measure="delta"))
    assert sum(found.tensors.values()) == pytest.approx(found.candidate.score)
    assert found.to_dict()["by_scale"] == found.strengths == {}
    with pytest.raises(PimergeError, match="there is no candidate 'z'"):
        explain("a", "z", RankRequest(measure="delta"))
