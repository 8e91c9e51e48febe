"""Similarities by tensor, against NumPy on whole vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pimerge.ranking.cosine import InnerProducts, Similarity, balanced, from_grams, from_vectors, unit

Vector = NDArray[np.float64]
WIDTHS = {"a": 7, "b": 3, "c": 12}


def parts_of(count: int, seed: int = 0, shift: float = 1.0) -> dict[str, Vector]:
    """Embeddings in three tensors, around a mean that is not zero."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal((count, width)) + shift for name, width in WIDTHS.items()}


def cosines(parts: dict[str, Vector], candidates: int, pool: Sequence[int]) -> list[float]:
    """Of the first with those after it, in one vector each, around the mean of the pool if it has three."""
    vectors = np.concatenate(list(parts.values()), 1)
    if len(pool) >= 3:
        vectors = vectors - vectors[list(pool)].mean(0)
    target = vectors[0]
    return [float(target @ v / np.linalg.norm(target) / np.linalg.norm(v)) for v in vectors[1 : candidates + 1]]


def both(parts: dict[str, Vector], candidates: int, pool: Sequence[int]) -> list[Similarity]:
    grams = [(name, rows @ rows.T) for name, rows in parts.items()]
    return [from_vectors(parts.items(), candidates, pool), from_grams(grams, candidates, pool)]


@pytest.mark.parametrize("pool", [[], [0], [0, 3], range(3), range(6), [3, 4, 5], [5, 1, 2]])
@pytest.mark.parametrize("candidates", [1, 3, 5])
def test_scores_are_cosines_around_the_mean_of_a_pool_of_three(candidates: int, pool: Sequence[int]) -> None:
    parts = parts_of(6)
    for found in both(parts, candidates, pool):
        assert found.scores().tolist() == pytest.approx(cosines(parts, candidates, pool), abs=1e-12)


@pytest.mark.parametrize("count", [3, 10, 57])
def test_copies_have_the_same_score_to_the_last_digit(count: int) -> None:
    generator = np.random.default_rng(0)
    parts = [(f"t{i}", generator.standard_normal((2, 101)).repeat([1, count], 0)) for i in range(33)]
    for pool in ([], range(count)):
        found = from_vectors(parts, count, pool)
        assert len(set(found.scores().tolist())) == 1
        assert len(set(found.errors().tolist())) == 1


def test_contributions_are_those_of_each_tensor() -> None:
    parts = parts_of(5)
    centred = {name: rows - rows.mean(0) for name, rows in parts.items()}
    whole = np.concatenate(list(centred.values()), 1)
    for found in both(parts, 4, range(5)):
        for row in range(4):
            scale = float(np.linalg.norm(whole[0]) * np.linalg.norm(whole[row + 1]))
            expected = [float(rows[0] @ rows[row + 1]) / scale for rows in centred.values()]
            assert found.contributions()[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert found.contributions().sum(1).tolist() == pytest.approx(found.scores().tolist(), abs=1e-12)


def test_what_is_the_mean_itself_has_no_direction() -> None:
    parts = {name: rows[:1].repeat(4, 0) for name, rows in parts_of(1).items()}
    for found in both(parts, 3, range(4)):
        assert found.scores().tolist() == [0, 0, 0]
        assert found.errors().tolist() == [0, 0, 0]


def many_tensors(count: int = 40) -> Similarity:
    generator = np.random.default_rng(0)
    tensors = [(f"t{i}", generator.standard_normal((4, 6)) + 0.3 * (i % 3)) for i in range(count)]
    return from_vectors(tensors, 3)


def test_errors_are_those_of_a_bootstrap_in_a_loop() -> None:
    found = many_tensors()
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        chosen = generator.integers(40, size=40)
        products, norms = found.products[:, chosen].sum(1), found.norms[:, chosen].sum(1)
        draws.append(products / np.sqrt(norms * found.own[0, chosen].sum()))
    expected = np.std(draws, 0)
    assert found.errors(draws=4000).tolist() == pytest.approx(expected.tolist(), rel=0.06)
    assert found.errors().tolist() == pytest.approx(expected.tolist(), rel=0.25)


def test_errors_are_reproducible_not_negative_and_zero_where_nothing_varies() -> None:
    found = many_tensors()
    assert np.array_equal(found.errors(), found.errors())
    assert not np.array_equal(found.errors(), found.errors(seed=1))
    assert (found.errors() > 0).all()
    assert from_vectors([("one", np.eye(3))], 2).errors().tolist() == [0, 0]
    alike = [(str(i), np.array([[1.0, 0], [1.0, 1.0]])) for i in range(5)]
    assert from_vectors(alike, 1).errors().item() == pytest.approx(0, abs=1e-7)


def test_balanced_is_the_mean_of_the_cosines() -> None:
    first, second = (from_vectors(parts_of(5, seed).items(), 4, range(5)) for seed in (0, 1))
    loud = Similarity(second.tensors, 100 * second.products, 100 * second.own, 100 * second.norms)
    found = balanced([first, loud], ["x", "y"])
    expected = (first.scores() + second.scores()) / 2
    assert found.scores().tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert found.tensors == [f"{tensor} ({name})" for name in "xy" for tensor in WIDTHS]
    halves = np.concatenate([first.contributions(), second.contributions()], 1) / 2
    np.testing.assert_allclose(found.contributions(), halves, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("row", [0, 1])
def test_in_balanced_a_part_that_is_zero_counts_as_zero(row: int) -> None:
    parts = parts_of(3)
    nothing = {name: rows * (np.arange(3) != row)[:, None] for name, rows in parts.items()}
    first, second = from_vectors(parts.items(), 2), from_vectors(nothing.items(), 2)
    found = balanced([first, second], ["x", "y"]).scores()
    assert float(found[0]) == pytest.approx(float(first.scores()[0]) / 2, abs=1e-12)
    assert second.scores()[0] == 0


def test_unit_rows_have_the_norm_one_or_none() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]])
    assert unit(rows).tolist() == [pytest.approx([0.6, 0.8]), [0, 0], pytest.approx([1, 0])]


@pytest.mark.parametrize("by", ["vectors", "grams"])
def test_of_a_sampled_pool_the_squared_norm_of_the_mean_is_without_bias(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many samples, against the mean of the pool that they are drawn from."""
    generator = np.random.default_rng(0)
    everything = 0.3 + generator.standard_normal((5000, 12))
    expected = float(np.square(everything.mean(0)).sum())
    found: list[InnerProducts] = []
    around = InnerProducts.around

    def watched(*args: Any) -> InnerProducts:
        found.append(around(*args))
        return found[-1]

    monkeypatch.setattr(InnerProducts, "around", watched)
    wholes: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2000):
        rows = everything[generator.choice(5000, 8, replace=False)]
        for sampled, values in wholes.items():
            if by == "vectors":
                from_vectors([("q", rows)], 2, range(2, 8), sampled)
            else:
                from_grams([("q", rows @ rows.T)], 2, range(2, 8), sampled)
            values.append(found.pop().whole)
    errors = {sampled: np.std(values) / len(values) ** 0.5 for sampled, values in wholes.items()}
    assert abs(np.mean(wholes[True]) - expected) < 3 * errors[True]
    variance = float(everything.var(0).sum())
    assert np.mean(wholes[False]) - expected == pytest.approx(variance / 6, abs=4 * errors[False])
    assert np.mean(wholes[False]) - expected > 20 * errors[False]


def test_a_sample_of_copies_has_their_norm_and_one_of_two_no_mean() -> None:
    rows = parts_of(1)["a"].repeat(4, 0)
    for sampled in (False, True):
        found = from_vectors([("a", rows)], 3, range(4), sampled)
        assert found.own.tolist() == [[0]]
        assert from_vectors([("a", rows)], 3, range(2), sampled).scores().tolist() == pytest.approx([1] * 3)


def test_squares_around_a_sampled_mean_are_never_negative() -> None:
    rows = np.array([[0.1, 0.0], [0.2, 0.1], [1.0, 0.0], [-1.0, 0.1], [0.0, -1.0], [0.1, 1.0]])
    found = from_vectors([("q", rows)], 1, range(2, 6), sampled=True)
    assert found.own.min() == found.norms.min() == 0
    assert found.scores().tolist() == [0]
