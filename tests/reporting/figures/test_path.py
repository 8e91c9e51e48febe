"""Paths and gains against dense sums in a plain model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from pimerge.adapters.expert import open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.reporting.figures import gain, path
from pimerge.reporting.figures._study import AnswerScore, ShownExamples, Study
from pimerge.tasks.task import open_task
from tests.support import looks
from tests.support.experts import MakeExpert
from tests.support.references import ByHand
from tests.support.tasks import write_text_task


@pytest.fixture(scope="module")
def data(study: Study) -> path.PathData:
    return path.FIGURE.compute(study, step=0.4)


def test_every_point_is_that_of_the_dense_sum(study: Study, data: path.PathData, by_hand: ByHand) -> None:
    assert data.alphas == [0.0, 0.4, 0.8, 1.0]
    assert [each.expert for each in data.paths] == ["y", "z"]
    for each, expert in zip(data.paths, study.experts, strict=True):
        for alpha, point in zip(data.alphas, each.points, strict=True):
            accuracy, loss = by_hand([study.target, expert], [1 - alpha, alpha])
            assert point.accuracy == accuracy
            assert point.loss == pytest.approx(loss, rel=1e-5)
    assert data.shown == ShownExamples(target="x", head="x", examples=50, seed=0)


def test_a_limit_draws_some_examples_by_the_seed(study: Study) -> None:
    few = [path.FIGURE.compute(study, step=1.0, limit=10, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1]
    assert few[0].shown.examples == 10
    assert few[0].paths[0].points != few[2].paths[0].points


@pytest.mark.parametrize("step", [0.0, -1.0, 1.5, math.nan])
def test_a_step_out_of_range_is_refused(study: Study, step: float) -> None:
    with pytest.raises(PimergeError, match="--step must be"):
        path.FIGURE.compute(study, step=step)


def test_a_target_without_a_head_is_refused(study: Study, pool: Path) -> None:
    headless = dataclasses.replace(study, target=open_expert(pool / "h"))
    with pytest.raises(PimergeError, match=r"no head to answer with\n.*pimerge tune"):
        path.FIGURE.compute(headless)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_bases_that_answer_in_text_have_paths(
    tmp_path: Path, language_base: object, make_expert: MakeExpert, kind: str
) -> None:
    base = language_base("t5")  # type: ignore[operator]
    task = write_text_task(tmp_path / "task", "t5")
    experts = [
        open_expert(make_expert(tmp_path / name, base, task, kind=kind, seed=seed, head=False))
        for seed, name in enumerate("ab")
    ]
    study = Study(experts[0], open_task(task), find_base(str(base), None, tmp_path), experts[1:])
    data = path.FIGURE.compute(study, step=0.5)
    assert data.shown.head == "(base)"
    losses = [point.loss for point in data.paths[0].points]
    assert len(set(losses)) == 3


def paths_of(values: list[list[float]], names: list[str]) -> path.PathData:
    """Paths with these accuracies; the loss is the rest to 1."""
    return path.PathData(
        shown=ShownExamples(target="x", head="x", examples=100, seed=0),
        target_sha256="t",
        alphas=np.linspace(0, 1, len(values[0])).tolist(),
        paths=[
            path.ExpertPath(
                expert=name, sha256=f"sha-{place}", points=[AnswerScore(accuracy=v, loss=1 - v) for v in row]
            )
            for place, (name, row) in enumerate(zip(names, values, strict=True))
        ],
        left_out={},
    )


def ranked(scores: list[float], target: str = "t") -> Ranking:
    return Ranking(
        target=Target(name="x", path="x", sha256=target),
        measure="combined",
        k=1,
        selected=[],
        why="",
        candidates=[
            Candidate(name=str(place), path="", sha256=f"sha-{place}", score=score, low=score, high=score)
            for place, score in enumerate(scores)
        ],
        not_comparable=[],
    )


def test_gains_are_the_highest_above_the_start() -> None:
    paths = paths_of([[0.5, 0.7, 0.6], [0.5, 0.4, 0.2], [0.5, 0.5, 0.9]], ["a", "b", "c"])
    data = gain.FIGURE.compute((ranked([0.2, 0.1, 0.4]), paths))
    assert [point.accuracy for point in data.points] == pytest.approx([0.2, 0.0, 0.4])
    assert [point.accuracy_alpha for point in data.points] == [0.5, 0.0, 1.0]
    assert [point.loss for point in data.points] == pytest.approx([0.2, 0.0, 0.4])
    assert data.accuracy.pearson == pytest.approx(np.corrcoef([0.2, 0.1, 0.4], [0.2, 0.0, 0.4])[0, 1])
    assert data.accuracy.spearman == pytest.approx(1.0)
    assert data.error == pytest.approx(0.05)


def test_without_three_points_there_is_no_correlation() -> None:
    data = gain.FIGURE.compute((ranked([0.2, 0.1]), paths_of([[0.5, 0.7], [0.5, 0.6]], ["a", "b"])))
    assert (data.accuracy.pearson, data.accuracy.spearman) == (None, None)
    looks.assert_good(gain.FIGURE, data, ["no correlation"])


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [(ranked([0.1], "other"), "which has changed since"), (ranked([]), "has none of the experts")],
)
def test_paths_of_another_target_are_refused(ranking: Ranking, expected: str) -> None:
    with pytest.raises(PimergeError, match=expected) as error:
        gain.FIGURE.compute((ranking, paths_of([[0.5, 0.7]], ["a"])))
    assert "pimerge plot path --force" in str(error.value)


@pytest.mark.parametrize("count", [1, 40])
def test_both_are_readable_for_any_number_of_experts(count: int) -> None:
    generator = np.random.default_rng(count)
    values = np.clip(0.5 + generator.normal(size=(count, 21)).cumsum(1) / 30, 0, 1)
    values[:, 0] = 0.5
    paths = paths_of(values.tolist(), looks.names(count))
    looks.assert_good(path.FIGURE, paths)
    looks.assert_good(gain.FIGURE, gain.FIGURE.compute((ranked(generator.random(count).tolist()), paths)))
