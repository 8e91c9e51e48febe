"""The cosine of experts' numbers, against all of them in one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import WEIGHTS
from pimerge.embedding.store_view import StoreView
from pimerge.ranking.measures.parameters import similarity
from tests.support.experts import MakeExpert, edit_tensors

Make = Callable[..., Expert]


@pytest.fixture
def make(tmp_path: Path, make_expert: MakeExpert, vit_base: Path) -> Make:
    def made(name: str, seed: int = 0, **config: object) -> Expert:
        return open_expert(make_expert(tmp_path / name, vit_base, seed=seed, **config))

    return made


def cosine(first: Expert, second: Expert) -> float:
    """Every tensor of the file that is a factor, in one vector."""
    a, b = load_file(first.path / WEIGHTS), load_file(second.path / WEIGHTS)
    vectors: list[list[NDArray[np.float64]]] = [[], []]
    for key in sorted(a.keys() | b.keys()):
        shape = (a if key in a else b)[key].shape
        if ".lora_" in key:
            for vector, file in zip(vectors, (a, b), strict=True):
                vector.append(file.get(key, np.zeros(shape)).astype(np.float64).ravel())
    u, v = (np.concatenate(vector) for vector in vectors)
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def scores(target: Expert, candidates: Sequence[Expert]) -> list[float]:
    members = [StoreView(expert) for expert in (target, *candidates)]
    found: list[float] = similarity(members, len(candidates), range(len(members))).scores().tolist()
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_cosine_of_all_factors_in_one_vector(make: Make, bias: bool) -> None:
    experts = [make(str(seed), seed, lora_bias=bias) for seed in range(3)]
    expected = [cosine(experts[0], other) for other in experts]
    assert scores(experts[0], experts) == pytest.approx(expected, abs=1e-12)
    assert scores(experts[0], experts)[0] == pytest.approx(1)


def test_zero_has_no_direction(make: Make, tmp_path: Path, make_expert: MakeExpert, vit_base: Path) -> None:
    def clear(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    expert, zero = make("a"), open_expert(edit_tensors(make_expert(tmp_path / "zero", vit_base), clear))
    assert scores(expert, [zero]) == scores(zero, [expert]) == scores(zero, [zero]) == [0.0]
