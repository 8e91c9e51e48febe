"""The linear probe, against scikit-learn's logistic regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.models.linear_probe import (
    FOLDS,
    PENALTIES,
    PENALTY,
    fit_probe,
    held_out_log_likelihood,
    held_out_probability,
    in_row_space,
    probe_folds,
    standardised,
)
from tests.support.numerics import small


def clusters(n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clusters off the origin, whose directions are of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    strength = torch.arange(1, d + 1, dtype=torch.float64) ** -0.7
    noise, centres = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, classes))
    return 3 + (noise + centres[labels]) * strength, labels


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("n", "d", "classes"), [(60, 8, 3), (30, 100, 4), (40, 5, 2), (12, 12, 6)])
def test_it_is_logistic_regression(n: int, d: int, classes: int, penalty: float) -> None:
    vectors, labels = clusters(n, d, classes)
    x = (vectors - vectors.mean(0)).numpy()
    x /= np.sqrt((x**2).sum(1).mean())
    own = penalty / 2 if classes == 2 else penalty  # of two classes scikit-learn has one vector w: ours are ±w/2
    reference = LogisticRegression(C=1 / own, tol=1e-9, max_iter=100_000).fit(x, labels.numpy())
    found = fit_probe(vectors, labels, classes, penalty).log_probabilities(vectors)
    np.testing.assert_allclose(found.numpy(), reference.predict_log_proba(x), atol=1e-3 if penalty < 1 else 1e-4)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 100)])
def test_it_is_the_minimum(n: int, d: int) -> None:
    vectors, labels = clusters(n, d, 3)
    probe = fit_probe(vectors, labels, 3, penalty=0.01)
    scale = (vectors - vectors.mean(0)).square().sum(1).mean().sqrt()
    weights, bias = (probe.weights * scale).requires_grad_(), probe.bias.clone().requires_grad_()
    logs = ((vectors - vectors.mean(0)) / scale @ weights + bias).log_softmax(1)
    loss = -logs[range(n), labels].sum() + 0.01 / 2 * weights.square().sum()
    for gradient in torch.autograd.grad(loss, [weights, bias]):
        assert gradient.norm() < 1e-6 * n


def test_scale_shift_and_rotation_of_the_features_do_not_matter() -> None:
    vectors, labels = clusters(30, 50, 3)
    expected = fit_probe(vectors, labels, 3).log_probabilities(vectors)
    for changed in (vectors * 1e6, vectors * 1e-6, vectors + 7, vectors @ rotation(50)):
        found = fit_probe(changed, labels, 3).log_probabilities(changed)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_new_examples_may_leave_the_span_of_the_old() -> None:
    vectors, labels = clusters(10, 40, 2)
    new, _ = clusters(50, 40, 2, seed=1)
    probabilities = fit_probe(vectors, labels, 2).log_probabilities(new).exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_features_give_the_frequencies_of_the_classes(value: float) -> None:
    vectors, labels = torch.full((10, 4), value, dtype=torch.float64), torch.tensor([0] * 7 + [1] * 3)
    found = fit_probe(vectors, labels, 2).log_probabilities(vectors[:1]).exp()
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.3]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_class_without_examples_is_hardly_expected() -> None:
    vectors, labels = clusters(20, 5, 2)
    found = fit_probe(vectors, labels, 4).log_probabilities(vectors)
    assert found.isfinite().all()
    assert found[:, 2:].exp().max() < 1e-6


def test_held_out_is_by_a_probe_of_the_other_folds() -> None:
    vectors, labels = clusters(31, 50, 3)
    fold = probe_folds(labels, 4, seed=3)
    means = []
    for penalty in PENALTIES:
        each = torch.zeros(31, dtype=torch.float64)
        for index in range(4):
            seen, held = fold != index, fold == index
            logs = fit_probe(vectors[seen], labels[seen], 3, penalty).log_probabilities(vectors[held])
            each[held] = logs[range(len(logs)), labels[held]]
        means.append(each.mean().item())
        found = held_out_log_likelihood(vectors, labels, 3, [penalty], folds=4, seed=3)
        torch.testing.assert_close(found, each, atol=2e-3, rtol=1e-3)
    assert held_out_log_likelihood(vectors, labels, 3, folds=4, seed=3).mean() == pytest.approx(max(means), abs=1e-3)


def test_held_out_tells_signal_from_noise() -> None:
    vectors, labels = clusters(100, 20, 4)
    noise = torch.randn(100, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert held_out_log_likelihood(vectors, labels, 4).mean() > -0.8
    assert held_out_log_likelihood(noise, labels, 4).mean() == pytest.approx(-math.log(4), abs=0.1)


@small
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 3))
def test_folds_are_stratified_and_of_one_size(found: list[int], folds: int, seed: int) -> None:
    labels = torch.tensor(found)
    counts = labels.bincount()
    if counts.max() < 2:
        with pytest.raises(PimergeError, match="every class has one example"):
            probe_folds(labels, folds, seed)
        return
    fold = probe_folds(labels, folds, seed)
    used = min(folds, int(counts.max()))
    assert ((fold < 0) == (counts[labels] == 1)).all()
    assert fold.max() == used - 1
    sizes = fold[fold >= 0].bincount(minlength=used)
    assert sizes.max() - sizes.min() <= 1
    for label in counts.nonzero()[:, 0]:
        if counts[label] > 1:
            each = fold[labels == label].bincount(minlength=used)
            assert each.max() - each.min() <= 1
            assert each.max() < counts[label], "no class may miss from the training"


def test_the_only_example_of_a_class_is_not_held_out() -> None:
    vectors, _ = clusters(7, 4, 2)
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 0])
    assert held_out_log_likelihood(vectors, labels, 4).isnan().tolist() == [False] * 4 + [True] + [False] * 2


def test_two_examples_of_one_class_are_two_folds() -> None:
    vectors, _ = clusters(3, 4, 2)
    assert held_out_log_likelihood(vectors, torch.tensor([0, 1, 0]), 2).isfinite().tolist() == [True, False, True]


def test_nothing_can_be_held_out_of_classes_of_one() -> None:
    vectors, labels = clusters(3, 4, 3)
    with pytest.raises(PimergeError, match="every class has one example") as caught:
        held_out_log_likelihood(vectors, labels, 3)
    assert caught.value.problems[0].hint


def test_held_out_is_the_same_each_time() -> None:
    vectors, labels = clusters(40, 60, 4)
    found = [held_out_log_likelihood(vectors, labels, 4, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("n", "repeats"), [(30, 4), (150, 2), (450, 1)])
def test_the_probability_is_the_mean_over_the_divisions_into_folds(n: int, repeats: int) -> None:
    vectors, labels = clusters(n, 12, 3)
    each = torch.zeros(repeats, n, dtype=torch.float64)
    for seed in range(repeats):
        fold = probe_folds(labels, FOLDS, seed)
        for index in range(FOLDS):
            seen, held = fold != index, fold == index
            logs = fit_probe(vectors[seen], labels[seen], 3, PENALTY).log_probabilities(vectors[held])
            each[seed, held] = logs[range(len(logs)), labels[held]].exp()
    torch.testing.assert_close(held_out_probability(vectors, labels, 3), each.mean(0), atol=1e-3, rtol=0)


def test_the_probability_varies_less_with_the_folds_than_that_of_one_division() -> None:
    vectors, labels = clusters(30, 12, 3)

    def spread(scores: list[Tensor]) -> float:
        return float(torch.stack([score.mean() for score in scores]).std())

    once = [held_out_log_likelihood(vectors, labels, 3, (PENALTY,), seed=seed).exp() for seed in range(20)]
    several = [held_out_probability(vectors, labels, 3, seed=100 * seed) for seed in range(20)]
    assert spread(several) < 0.8 * spread(once)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (5, 5)])
def test_the_row_space_keeps_inner_products(shape: tuple[int, int]) -> None:
    vectors, _ = clusters(*shape, 2)
    reduced = in_row_space(vectors)
    assert reduced.shape == (shape[0], min(shape))
    torch.testing.assert_close(reduced @ reduced.T, vectors @ vectors.T)


def test_standardised_counts_repetitions() -> None:
    vectors, _ = clusters(5, 3, 2)
    times = torch.tensor([2, 0, 1, 3, 1])
    repeated = vectors.repeat_interleave(times, dim=0)
    found = standardised(vectors, times.double()).repeat_interleave(times, dim=0)
    torch.testing.assert_close(found, standardised(repeated, torch.ones(7, dtype=torch.float64)))
    torch.testing.assert_close(found.mean(0), torch.zeros(3, dtype=torch.float64))
    assert found.square().sum(1).mean() == pytest.approx(1)
