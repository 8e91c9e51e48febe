"""The plane of three experts against dense updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.errors import PimergeError
from pimerge.reporting.figures import landscape
from pimerge.reporting.figures._plane import Plane, inner_products
from pimerge.reporting.figures._study import AnswerScore, ShownExamples, Study
from tests.support import looks
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.references import ByHand
from tests.support.tasks import write_json


def flat(expert: Expert) -> np.ndarray:
    return torch.cat([delta.flatten() for _, delta in sorted(dense_deltas(expert).items())]).numpy()


@pytest.fixture(scope="module")
def three(study: Study) -> list[Expert]:
    return [study.target, *study.experts]


def test_coordinates_have_the_lengths_and_angles_of_the_updates(three: list[Expert]) -> None:
    plane = Plane.through(three)
    dense = [flat(expert) for expert in three]
    corners = [plane.place(dict.fromkeys(plane.products, row))[0] for row in np.eye(3).tolist()]
    assert corners[0] == pytest.approx([0, 0], abs=1e-6)
    for one in range(3):
        for other in range(3):
            expected = np.linalg.norm(dense[one] - dense[other])
            assert np.linalg.norm(corners[one] - corners[other]) == pytest.approx(expected, abs=1e-6)
    weights = plane.weights(np.array([[0.3, -0.2], [1.0, 2.0]]))
    assert weights.sum(1) == pytest.approx([1, 1])
    for row, place in zip(weights, [[0.3, -0.2], [1.0, 2.0]], strict=True):
        assert plane.place(dict.fromkeys(plane.products, row.tolist()))[0] == pytest.approx(place)


def test_weights_by_module_lie_where_their_projection_is(three: list[Expert]) -> None:
    plane = Plane.through(three)
    generator = np.random.default_rng(0)
    weights = {name: generator.random(3).tolist() for name in plane.products}
    deltas = [dense_deltas(expert) for expert in three]
    own = torch.cat(
        [sum(w * d[name] for w, d in zip(weights[name], deltas, strict=True)).flatten() for name in sorted(deltas[0])]  # type: ignore[union-attr]
    ).numpy()
    dense = [flat(expert) for expert in three]
    directions = np.stack([dense[1] - dense[0], dense[2] - dense[0]], 1)
    best, *_ = np.linalg.lstsq(directions, own - dense[0], rcond=None)
    place, off = plane.place(weights)
    assert plane.weights(place[None])[0] == pytest.approx([1 - best.sum(), *best])
    rest = np.linalg.norm(own - dense[0] - directions @ best)
    assert off == pytest.approx(rest / np.linalg.norm(own - dense[0]))


def test_inner_products_of_experts_without_updates_are_those_of_their_tensors(
    tmp_path: Path, vit_base: Path, make_expert: MakeExpert
) -> None:
    experts = [
        open_expert(make_expert(tmp_path / name, vit_base, kind="bitfit", seed=i)) for i, name in enumerate("ab")
    ]
    total = sum(inner_products(experts).values())
    assert isinstance(total, np.ndarray)
    rows = [torch.cat([expert.tensor(key).flatten() for key in expert.keys]).double() for expert in experts]
    expected = [[float(a @ b) for b in rows] for a in rows]
    assert total == pytest.approx(np.array(expected), rel=1e-6)


def test_every_point_is_that_of_the_dense_sum(
    study: Study, three: list[Expert], tmp_path: Path, by_hand: ByHand
) -> None:
    modules = list(three[0].modules)
    document = {
        "method": "interpolated",
        "granularity": "global",
        "experts": ["z", "y"],
        "sha256": [three[2].sha256, three[1].sha256],
        "scales": [1.0, 0.5],
        "experts_trained": False,
        "weights": {module: [0.25, 0.5] for module in modules},
    }
    (tmp_path / "mixed").mkdir()
    write_json(tmp_path / "mixed" / "coefficients.json", document)
    mixed = tmp_path / "mixed" / "coefficients.json"
    data = landscape.FIGURE.compute(study, grid=3, limit=50, coefficients=(mixed,))
    plane = Plane.through(three)
    for y, row in zip(data.y, data.grid, strict=True):
        weights = plane.weights(np.array([[data.x[1], y]]))[0].tolist()
        accuracy, loss = by_hand(three, weights)
        assert row[1].accuracy == accuracy
        assert row[1].loss == pytest.approx(loss, rel=1e-4)
    marks = {mark.name: mark for mark in data.marked}
    assert list(marks) == ["x", "y", "z", "uniform of the three", "mixed"]
    assert marks["uniform of the three"].weights == pytest.approx([1 / 3] * 3)
    assert (marks["x"].score.accuracy, marks["x"].off) == (by_hand([three[0]], [1.0])[0], 0.0)
    assert marks["mixed"].off > 0  # its weights do not sum to 1
    looks.assert_good(landscape.FIGURE, data, ["uniform", "off)"])


def test_what_has_no_plane_is_refused(study: Study, tmp_path: Path, make_expert: MakeExpert, vit_base: Path) -> None:
    alone = dataclasses.replace(study, experts=study.experts[:1])
    with pytest.raises(PimergeError, match=r"there are 2 with the target's\n.*pimerge plot landscape NAME NAME"):
        landscape.FIGURE.compute(alone)
    line = dataclasses.replace(study, experts=[study.experts[0], study.experts[0].with_strength(2.0)])
    with pytest.raises(PimergeError, match="--grid must be at least 3; got 1"):
        landscape.FIGURE.compute(study, grid=1)
    same = dataclasses.replace(line, target=study.experts[0].with_strength(3.0))
    with pytest.raises(PimergeError, match="lie on one line"):
        landscape.FIGURE.compute(same)
    document = {
        "method": "learned",
        "granularity": "matrix",
        "experts": ["stranger"],
        "sha256": ["0"],
        "experts_trained": False,
        "weights": {"q": [1.0]},
    }
    write_json(tmp_path / "c.json", document)
    with pytest.raises(PimergeError, match="also weights stranger"):
        landscape.FIGURE.compute(study, coefficients=(tmp_path / "c.json",))


def test_a_flat_landscape_with_long_names_is_readable() -> None:
    point = AnswerScore(accuracy=0.5, loss=0.7)
    names = [looks.LONG + "-1", looks.LONG + "-2", "a$b$c", "uniform"]
    kinds = ["expert"] * 3 + ["uniform"]
    data = landscape.LandscapeData(
        shown=ShownExamples(target="x", head="x", examples=5, seed=0),
        experts=names[:3],
        sha256=["0", "1", "2"],
        x=[-1, 0, 1],
        y=[-1, 0, 1],
        grid=[[point] * 3] * 3,
        marked=[
            landscape.MarkedPoint(name=name, kind=kind, weights=[1, 0, 0], x=x, y=y, off=0, score=point)  # type: ignore[arg-type]
            for name, kind, x, y in zip(names, kinds, [0, 0.5, 0, 0.01], [0, 0, 0.5, 0.01], strict=True)
        ],
    )
    looks.assert_good(landscape.FIGURE, data)
