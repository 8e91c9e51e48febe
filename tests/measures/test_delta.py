"""The cosine of updates, against dense ΔW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.expert import Expert, open_expert
from pimerge.measures.delta import inner_product, scores
from tests.conftest import MakeExpert, change_basis, dense_deltas, edit_tensors

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


def dense_product(first: Expert, second: Expert) -> float:
    a, b = dense_deltas(first), dense_deltas(second)
    return sum(float((a[name] * b[name]).sum()) for name in a.keys() & b.keys())


@pytest.mark.parametrize("target", CONFIGS)
def test_delta_is_the_cosine_of_dense_updates(experts: dict[str, Expert], target: str) -> None:
    own = experts[target]
    expected = [
        dense_product(own, other) / (dense_product(own, own) * dense_product(other, other)) ** 0.5
        for other in experts.values()
    ]
    assert scores(own, list(experts.values())) == pytest.approx(expected, abs=1e-9)


def test_updates_without_a_shared_module_are_orthogonal(experts: dict[str, Expert]) -> None:
    assert scores(experts["plain"], [experts["no shared module"]]) == [0.0]
    assert inner_product(experts["plain"], experts["no shared module"]) == 0.0


def test_delta_does_not_see_the_basis_of_the_factors(
    experts: dict[str, Expert], make_expert: MakeExpert, vit_base: Path, tmp_path: Path
) -> None:
    basis = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    turned = edit_tensors(make_expert(tmp_path, vit_base), lambda tensors: change_basis(tensors, basis))
    assert scores(experts["plain"], [open_expert(turned)]) == pytest.approx([1.0], abs=1e-6)
