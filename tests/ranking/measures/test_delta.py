"""The cosine of updates around the pool's mean, against dense ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pimerge.adapters.expert import Expert, open_expert
from pimerge.embedding.store_view import StoreView
from pimerge.ranking.measures.delta import similarity
from tests.support.experts import MakeExpert, dense_deltas, edit_tensors
from tests.support.numerics import change_basis

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other rank": {"r": 7, "init_seed": 1},
    "rslora": {"r": 3, "use_rslora": True, "init_seed": 2},
    "other modules": {"target_modules": ["v_proj", "o_proj"]},
    "no shared module": {"target_modules": ["o_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path) -> dict[str, Expert]:
    folder = tmp_path_factory.mktemp("delta")
    return {
        name: open_expert(make_expert(folder / name.replace(" ", "-"), vit_base, seed=seed, **config))
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


def scores(members: Sequence[Expert], candidates: int, pool: Sequence[int]) -> list[float]:
    found: list[float] = similarity([StoreView(expert) for expert in members], candidates, pool).scores().tolist()
    return found


def dense_scores(members: Sequence[Expert], candidates: int, pool: Sequence[int]) -> list[float]:
    """With every ΔW of every member in one vector, zero where it adapts nothing."""
    deltas = [dense_deltas(expert) for expert in members]
    shapes = {name: value.shape for delta in deltas for name, value in delta.items()}
    vectors: list[NDArray[np.float64]] = [
        np.concatenate([delta.get(name, torch.zeros(shape)).double().numpy().ravel() for name, shape in shapes.items()])
        for delta in deltas
    ]
    mean = np.mean([vectors[i] for i in pool], 0) if len(pool) > 2 else 0.0
    target, *others = [vector - mean for vector in vectors[: candidates + 1]]
    return [float(target @ v / np.sqrt((target @ target) * (v @ v))) if (v @ v) > 0 else 0.0 for v in others]


def turned(experts: dict[str, Expert], first: str) -> list[Expert]:
    return [experts[first], *(expert for name, expert in experts.items() if name != first)]


@pytest.mark.parametrize("pool", [[], range(6), [0, 1, 2], [3, 4, 5], [1, 3, 5, 4]])
@pytest.mark.parametrize("target", CONFIGS)
def test_delta_is_the_cosine_of_dense_updates(experts: dict[str, Expert], target: str, pool: Sequence[int]) -> None:
    members = turned(experts, target)
    for candidates in (5, 2):
        assert scores(members, candidates, pool) == pytest.approx(dense_scores(members, candidates, pool), abs=1e-9)


@pytest.mark.parametrize("pool", [range(6), [1, 3, 5, 4]])
@pytest.mark.parametrize("target", CONFIGS)
def test_of_a_sampled_pool_the_products_of_two_different_members_are_averaged(
    experts: dict[str, Expert], target: str, pool: Sequence[int]
) -> None:
    members = turned(experts, target)
    found = similarity([StoreView(expert) for expert in members], 5, pool, sampled=True)
    dense = [dense_deltas(expert) for expert in members]
    for place, name in enumerate(found.tensors):
        shape = next(delta[name].shape for delta in dense if name in delta)
        vectors = [delta.get(name, torch.zeros(shape)).double().numpy().ravel() for delta in dense]
        whole = np.mean([vectors[i] @ vectors[j] for i in pool for j in pool if i != j])
        mean = np.mean([vectors[i] for i in pool], 0)
        products = [vectors[0] @ v - vectors[0] @ mean - v @ mean + whole for v in vectors]
        norms = [max(v @ v - 2 * v @ mean + whole, 0) for v in vectors]
        assert found.products[:, place] == pytest.approx(products[1:], abs=1e-9)
        assert [*found.own[:, place], *found.norms[:, place]] == pytest.approx(norms, abs=1e-9)


def test_a_pool_whose_ranks_add_up_to_more_than_the_width(
    make_expert: MakeExpert, vit_base: Path, tmp_path: Path
) -> None:
    members = [open_expert(make_expert(tmp_path / str(seed), vit_base, seed=seed, r=9)) for seed in range(4)]
    assert scores(members, 3, range(4)) == pytest.approx(dense_scores(members, 3, range(4)), abs=1e-9)


def test_updates_without_a_shared_module_are_orthogonal(experts: dict[str, Expert]) -> None:
    assert scores([experts["plain"], experts["no shared module"]], 1, range(2)) == [0.0]


def test_delta_does_not_see_the_basis_of_the_factors(
    experts: dict[str, Expert], make_expert: MakeExpert, vit_base: Path, tmp_path: Path
) -> None:
    basis = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    other = open_expert(edit_tensors(make_expert(tmp_path, vit_base), lambda tensors: change_basis(tensors, basis)))
    rest = [experts["rslora"], experts["patterns"]]
    copy, *others = scores([experts["plain"], other, *rest], 3, range(4))
    assert copy == pytest.approx(1.0, abs=1e-6)
    assert others == pytest.approx(scores([other, experts["plain"], *rest], 3, range(4))[1:], abs=1e-5)
