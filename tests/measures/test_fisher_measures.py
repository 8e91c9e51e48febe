"""The measures on Fisher diagonals, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pimerge.measures import fisher, fisher_raw, task2vec

Vector = NDArray[np.float64]
MODULES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj")


def random_diagonal(seed: int) -> dict[str, Tensor]:
    """A diagonal with the spread of real ones: a few entries are huge."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "lora_B.bias": (5,)}
    return {
        f"base_model.model.{module}.{part}": torch.randn(shape, generator=generator).mul(2).exp()
        for module in MODULES
        for part, shape in shapes.items()
    }


POOL = [random_diagonal(seed) for seed in range(5)]


def cosine(a: Vector, b: Vector) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def flat(diagonal: dict[str, Tensor], keys: Sequence[str]) -> Vector:
    return np.concatenate([diagonal[key].numpy().astype(np.float64).ravel() for key in keys])


def unit_B(diagonal: dict[str, Tensor]) -> Vector:
    parts = [diagonal[f"base_model.model.{module}.lora_B.weight"].numpy().astype(np.float64) for module in MODULES]
    return np.concatenate([part.ravel() / np.linalg.norm(part) for part in parts])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fisher_is_the_centred_cosine_of_unit_factors_B(count: int) -> None:
    embeddings = [unit_B(diagonal) for diagonal in POOL[: count + 1]]
    mean = sum(embeddings) / len(embeddings)
    expected = [cosine(embeddings[0] - mean, other - mean) for other in embeddings[1:]]
    assert fisher.scores(POOL[0], POOL[1 : count + 1]) == pytest.approx(expected, abs=1e-12)


def test_fisher_of_two_embeddings_is_not_centred() -> None:
    expected = cosine(unit_B(POOL[0]), unit_B(POOL[1]))
    assert fisher.scores(POOL[0], POOL[1:2]) == pytest.approx([expected], abs=1e-12)
    assert expected > 0


def test_fisher_does_not_see_the_scale_of_a_tensor_nor_A_nor_biases() -> None:
    scaled = {
        key: value * (1000 if "q_proj" in key else 0.01) if key.endswith("lora_B.weight") else torch.zeros_like(value)
        for key, value in POOL[1].items()
    }
    assert fisher.scores(POOL[0], [scaled]) == pytest.approx(fisher.scores(POOL[0], POOL[1:2]), abs=1e-6)


def test_fisher_raw_is_the_cosine_of_everything() -> None:
    keys = sorted(POOL[0])
    expected = [cosine(flat(POOL[0], keys), flat(other, keys)) for other in POOL[1:]]
    assert fisher_raw.scores(POOL[0], POOL[1:]) == pytest.approx(expected, abs=1e-12)


def test_task2vec_is_the_mean_cosine_of_shares() -> None:
    expected = []
    for other in POOL[1:]:
        cosines = []
        for key in POOL[0]:
            a, b = flat(POOL[0], [key]), flat(other, [key])
            cosines.append(cosine(a / (a + b + 1e-6), b / (a + b + 1e-6)))
        expected.append(np.mean(cosines))
    assert task2vec.scores(POOL[0], POOL[1:]) == pytest.approx(expected, abs=1e-12)
