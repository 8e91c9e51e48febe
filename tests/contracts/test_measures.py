"""Laws that every measure in the folder's listing keeps."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pimerge import strategies
from pimerge.expert import open_expert
from tests.conftest import MakeExpert, edit_tensors

COUNT = 5


def random_diagonal(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.layers.{layer}.q_proj.lora_{part}.weight": torch.randn(shape, generator=generator).square()
        for layer in range(2)
        for part, shape in (("A", (2, 6)), ("B", (5, 2)))
    }


def set_to_zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path) -> dict[str, list[Any]]:
    """What a measure NEEDS → data of several experts; the last one is zero."""
    folder = tmp_path_factory.mktemp("pool")
    experts = [open_expert(make_expert(folder / str(seed), vit_base, seed=seed)) for seed in range(COUNT)]
    zero = open_expert(edit_tensors(make_expert(folder / "zero", vit_base), set_to_zero))
    diagonals = [random_diagonal(seed) for seed in range(COUNT)]
    return {
        "delta": [*experts, zero],
        "fisher": [*diagonals, {key: torch.zeros_like(value) for key, value in diagonals[0].items()}],
    }


@pytest.fixture(params=sorted(strategies.summaries("measures")))
def measure(request: pytest.FixtureRequest) -> ModuleType:
    return strategies.load("measures", request.param)


@pytest.fixture
def pool(measure: ModuleType, pools: dict[str, list[Any]]) -> list[Any]:
    return pools[measure.NEEDS][:COUNT]


@pytest.fixture
def zero(measure: ModuleType, pools: dict[str, list[Any]]) -> Any:
    return pools[measure.NEEDS][COUNT]


def test_a_measure_says_what_it_needs(measure: ModuleType) -> None:
    assert measure.NEEDS in ("fisher", "delta")
    assert isinstance(measure.SAME_BASIS, bool)


def test_every_score_is_finite_and_in_order(measure: ModuleType, pool: list[Any]) -> None:
    scores = measure.scores(pool[0], pool[1:])
    assert len(scores) == COUNT - 1
    assert all(isinstance(score, float) and math.isfinite(score) and abs(score) <= 1 for score in scores)


def test_the_order_of_the_candidates_does_not_matter(measure: ModuleType, pool: list[Any]) -> None:
    forwards = measure.scores(pool[0], pool[1:])
    assert measure.scores(pool[0], pool[:0:-1])[::-1] == pytest.approx(forwards, abs=1e-12)


def test_two_experts_of_a_pool_are_as_close_to_each_other_from_either_side(
    measure: ModuleType, pool: list[Any]
) -> None:
    first, second, *rest = pool
    there, back = measure.scores(first, [second, *rest])[0], measure.scores(second, [first, *rest])[0]
    assert there == pytest.approx(back, abs=1e-12)


def test_nothing_is_closer_than_an_identical_copy(measure: ModuleType, pool: list[Any]) -> None:
    copy, *others = measure.scores(pool[0], [pool[0], *pool[1:]])
    assert copy == pytest.approx(1)
    assert copy >= max(others)


def test_a_pool_of_one_has_a_score(measure: ModuleType, pool: list[Any]) -> None:
    (score,) = measure.scores(pool[0], pool[1:2])
    assert math.isfinite(score)
    assert measure.scores(pool[0], pool[:1]) == [pytest.approx(1)]


def test_zero_is_finite_on_either_side(measure: ModuleType, pool: list[Any], zero: Any) -> None:
    assert all(map(math.isfinite, measure.scores(pool[0], [zero, *pool[1:]])))
    assert all(map(math.isfinite, measure.scores(zero, pool)))
    assert measure.scores(zero, [zero]) == [0]
    assert measure.scores(pool[0], [zero]) == [0]


def test_a_pool_of_copies_is_finite(measure: ModuleType, pool: list[Any]) -> None:
    scores = measure.scores(pool[0], [pool[0]] * 3)
    assert all(map(math.isfinite, scores))
    assert max(scores) == min(scores)


def test_the_inputs_are_not_changed(measure: ModuleType, pool: list[Any]) -> None:
    first = measure.scores(pool[0], pool[1:])
    assert measure.scores(pool[0], pool[1:]) == first
