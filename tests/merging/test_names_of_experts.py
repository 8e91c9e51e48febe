"""Experts in folders of one name are told apart wherever they are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.reporting.inspection import inspect as look
from tests.support.bases import save_base
from tests.support.experts import dense_deltas, raw_expert, updates_of
from tests.support.numerics import normal

SHAPES = {"layers.0.q": (6, 2, 5), "layers.1.q": (6, 3, 5)}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    save_base(tmp_path / "base", normal(2, 2))
    paths = [tmp_path / run / "checkpoint-500" for run in ("runA", "runB")]
    for seed, path in enumerate(paths):
        raw_expert(path, updates_of(SHAPES, seed=10 * seed), base_model_name_or_path="base")
    return paths


def test_rules_reach_the_expert_that_they_name(runs: list[Path], tmp_path: Path) -> None:
    rules = ["runA/checkpoint-500=0.7", "runB/checkpoint-500:layers.0.*=0.4", "runB/checkpoint-500:layers.1.*=-1"]
    merged = pimerge.merge(runs, method="interpolated", rules=rules, output=tmp_path / "out")
    first, second = (dense_deltas(open_expert(path)) for path in runs)
    found = dense_deltas(open_expert(tmp_path / "out"))
    for name, weight in (("layers.0.q", 0.4), ("layers.1.q", -1.0)):
        torch.testing.assert_close(found[name], 0.7 * first[name] + weight * second[name], rtol=1e-5, atol=1e-6)
    names = ["runA/checkpoint-500", "runB/checkpoint-500"]
    assert merged.to_dict()["experts"] == names
    written = (tmp_path / "out" / "README.md").read_text()
    assert all(name in written for name in names)


def test_coefficients_reach_the_expert_that_they_name(runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"runA/checkpoint-500": 1.0, "runB/checkpoint-500": 0.0}))
    pimerge.merge(runs, coefficients=file, output=tmp_path / "out")
    for name, delta in dense_deltas(open_expert(tmp_path / "out")).items():
        torch.testing.assert_close(delta, dense_deltas(open_expert(runs[0]))[name], rtol=1e-5, atol=1e-6)


def test_a_name_of_two_experts_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"'checkpoint-500' .* is runA/checkpoint-500 and runB/checkpoint-500"):
        pimerge.merge(runs, method="interpolated", rules=["checkpoint-500=1"], output=tmp_path / "out")


def test_inspect_names_them_apart(runs: list[Path]) -> None:
    found = look([str(path) for path in runs])
    assert [each.expert.name for each in found if each.expert] == ["runA/checkpoint-500", "runB/checkpoint-500"]
    assert found[0].merges_with == ("runB/checkpoint-500",)
