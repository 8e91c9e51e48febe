"""Similarities by tensor, against NumPy on whole vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pimerge.similarity import Similarity, balanced, from_grams, from_vectors, unit

Vector = NDArray[np.float64]
WIDTHS = {"a": 7, "b": 3, "c": 12}


def parts_of(count: int, seed: int = 0, shift: float = 1.0) -> dict[str, Tensor]:
    """Embeddings in three tensors, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, width, generator=generator, dtype=torch.float64) + shift
        for name, width in WIDTHS.items()
    }


def cosines(parts: dict[str, Tensor], candidates: int, pool: Sequence[int]) -> list[float]:
    """Of the first with those after it, in one vector each, around the mean of the pool if it has three."""
    vectors = torch.cat(list(parts.values()), 1).numpy()
    if len(pool) >= 3:
        vectors = vectors - vectors[list(pool)].mean(0)
    target = vectors[0]
    return [float(target @ v / np.linalg.norm(target) / np.linalg.norm(v)) for v in vectors[1 : candidates + 1]]


def both(parts: dict[str, Tensor], candidates: int, pool: Sequence[int]) -> list[Similarity]:
    grams = [(name, rows @ rows.T) for name, rows in parts.items()]
    return [from_vectors(parts.items(), candidates, pool), from_grams(grams, candidates, pool)]


@pytest.mark.parametrize("pool", [[], [0], [0, 3], range(3), range(6), [3, 4, 5], [5, 1, 2]])
@pytest.mark.parametrize("candidates", [1, 3, 5])
def test_scores_are_cosines_around_the_mean_of_a_pool_of_three(candidates: int, pool: Sequence[int]) -> None:
    parts = parts_of(6)
    for found in both(parts, candidates, pool):
        assert found.scores().tolist() == pytest.approx(cosines(parts, candidates, pool), abs=1e-12)


def test_contributions_are_those_of_each_tensor() -> None:
    parts = parts_of(5)
    centred = {name: rows - rows.mean(0) for name, rows in parts.items()}
    whole = torch.cat(list(centred.values()), 1)
    for found in both(parts, 4, range(5)):
        for row in range(4):
            scale = float(whole[0].norm() * whole[row + 1].norm())
            expected = [float(rows[0] @ rows[row + 1]) / scale for rows in centred.values()]
            assert found.contributions()[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert found.contributions().sum(1).tolist() == pytest.approx(found.scores().tolist(), abs=1e-12)


def test_what_is_the_mean_itself_has_no_direction() -> None:
    parts = {name: rows[:1].expand(4, -1) for name, rows in parts_of(1).items()}
    for found in both(parts, 3, range(4)):
        assert found.scores().tolist() == [0, 0, 0]
        assert found.errors().tolist() == [0, 0, 0]


def many_tensors(count: int = 40) -> Similarity:
    generator = torch.Generator().manual_seed(0)
    tensors = [(f"t{i}", torch.randn(4, 6, generator=generator) + 0.3 * (i % 3)) for i in range(count)]
    return from_vectors(tensors, 3)


def test_errors_are_those_of_a_bootstrap_in_a_loop() -> None:
    found = many_tensors()
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        chosen = generator.integers(40, size=40)
        products, norms = found.products[:, chosen].sum(1), found.norms[:, chosen].sum(1)
        draws.append((products / (norms * found.own[0, chosen].sum()).sqrt()).numpy())
    expected = np.std(draws, 0)
    assert found.errors(draws=4000).tolist() == pytest.approx(expected.tolist(), rel=0.06)
    assert found.errors().tolist() == pytest.approx(expected.tolist(), rel=0.25)


def test_errors_are_reproducible_not_negative_and_zero_where_nothing_varies() -> None:
    found = many_tensors()
    assert torch.equal(found.errors(), found.errors())
    assert not torch.equal(found.errors(), found.errors(seed=1))
    assert (found.errors() > 0).all()
    assert from_vectors([("one", torch.eye(3))], 2).errors().tolist() == [0, 0]
    alike = [(str(i), torch.tensor([[1.0, 0], [1.0, 1.0]])) for i in range(5)]
    assert float(from_vectors(alike, 1).errors()) == pytest.approx(0, abs=1e-7)


def test_balanced_is_the_mean_of_the_cosines() -> None:
    first, second = (from_vectors(parts_of(5, seed).items(), 4, range(5)) for seed in (0, 1))
    loud = Similarity(second.tensors, 100 * second.products, 100 * second.own, 100 * second.norms)
    found = balanced([first, loud], ["x", "y"])
    expected = (first.scores() + second.scores()) / 2
    assert found.scores().tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert found.tensors == [f"{tensor} ({name})" for name in "xy" for tensor in WIDTHS]
    halves = torch.cat([first.contributions(), second.contributions()], 1) / 2
    torch.testing.assert_close(found.contributions(), halves)


@pytest.mark.parametrize("row", [0, 1])
def test_in_balanced_a_part_that_is_zero_counts_as_zero(row: int) -> None:
    parts = parts_of(3)
    nothing = {name: rows.clone().index_fill_(0, torch.tensor([row]), 0.0) for name, rows in parts.items()}
    first, second = from_vectors(parts.items(), 2), from_vectors(nothing.items(), 2)
    found = balanced([first, second], ["x", "y"]).scores()
    assert float(found[0]) == pytest.approx(float(first.scores()[0]) / 2, abs=1e-12)
    assert second.scores()[0] == 0


def test_unit_rows_have_the_norm_one_or_none() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]])
    assert unit(rows).tolist() == [pytest.approx([0.6, 0.8]), [0, 0], pytest.approx([1, 0])]
