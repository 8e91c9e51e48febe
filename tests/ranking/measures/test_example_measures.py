"""The measures on examples, against slow references: dense formulas, scikit-learn and naive loops in NumPy."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.embedding.features import TargetFeatures
from pimerge.models.linear_probe import held_out_log_likelihood, held_out_probability
from pimerge.ranking.measures import h_score, label_cka, leep, likelihood, logme, loss, probe
from tests.support.numerics import small

Array = NDArray[np.float64]
FEATURES = [logme, label_cka, h_score]
"""The measures of features that count repeated examples."""
HELD_OUT = {probe: held_out_log_likelihood, likelihood: held_out_probability}
EVERY = [*FEATURES, *HELD_OUT, leep, loss]
SHAPES = [(40, 6, 3), (20, 50, 4), (12, 12, 2)]


def sample_of(n: int, d: int, classes: int, seed: int = 0, signal: float = 0.7) -> TargetFeatures:
    """Overlapping clusters off the origin; the head has five classes of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:2] = torch.arange(2)
    noise, centres = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, classes))
    logits = torch.randn(n, 5, generator=generator) + 2 * torch.eye(5)[labels % 5]
    losses = torch.rand(n, generator=generator)
    return TargetFeatures(1 + noise + signal * centres[labels], labels, classes, logits, losses)


def take(sample: TargetFeatures, rows: Tensor) -> TargetFeatures:
    assert sample.logits is not None
    assert sample.losses is not None
    return TargetFeatures(
        sample.vectors[rows], sample.labels[rows], sample.classes, sample.logits[rows], sample.losses[rows]
    )


def with_vectors(sample: TargetFeatures, vectors: Tensor) -> TargetFeatures:
    return TargetFeatures(vectors, sample.labels, sample.classes, sample.logits, sample.losses)


def plain(measure: ModuleType, sample: TargetFeatures) -> float:
    return float(measure.scores(sample, torch.ones(1, len(sample.labels), dtype=torch.float64)))


def draws_of(n: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(n, (n,), generator=generator).bincount(minlength=n) for _ in range(count)])


def arrays(sample: TargetFeatures) -> tuple[Array, NDArray[np.int64]]:
    return sample.vectors.numpy(), sample.labels.numpy()


def dense_evidence(x: Array, y: Array, alpha: float, beta: float) -> float:
    """log N(y; 0, β⁻¹ I + α⁻¹ X Xᵀ) per example."""
    covariance = np.eye(len(y)) / beta + x @ x.T / alpha
    size = np.linalg.slogdet(2 * math.pi * covariance).logabsdet
    return -float(size + y @ np.linalg.solve(covariance, y)) / 2 / len(y)


def best_dense_evidence(x: Array, y: Array) -> float:
    """The highest of a grid over log α and log β, then climbed; 1/β is at least LEAST_NOISE."""
    most = -math.log(logme.LEAST_NOISE)

    def minus(point: Array) -> float:
        return -dense_evidence(x, y, math.exp(point[0]), math.exp(point[1]))

    grid = [np.array([a, b]) for a in np.linspace(-10, 15, 26) for b in np.linspace(-2, most, 10)]
    best = min(grid, key=minus)
    bounds = [(-20, 25), (-4, most)]
    return -float(minimize(minus, best, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15}).fun)


@pytest.mark.parametrize("signal", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_logme_is_the_maximum_of_the_dense_evidence(shape: tuple[int, int, int], signal: float) -> None:
    sample = sample_of(*shape, signal=signal)
    x, labels = arrays(sample)
    expected = [best_dense_evidence(x, (labels == c).astype(float)) for c in np.unique(labels)]
    assert plain(logme, sample) == pytest.approx(np.mean(expected), abs=1e-6)


def test_logme_of_a_class_at_given_precisions_is_the_dense_evidence() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([1.0, 0, 0, 1, 0, 1, 0], dtype=torch.float64)
    sigma, axes = torch.linalg.eigh(x.T @ x / 7)
    explained = (axes.T @ (x.T @ y / 7)).square() / sigma
    left = y.square().mean() - explained.sum()
    for t in (0.01, 0.5, 30.0):
        found = logme._evidence(torch.tensor([[t]], dtype=torch.float64), sigma, explained[None], left[None], 7)
        residual = float(left + (explained / (1 + sigma / t)).sum())
        beta = 1 / residual
        dense = dense_evidence(x.numpy(), y.numpy(), 7 * t * beta, beta)
        assert float(found) == pytest.approx(dense, abs=1e-12)


def test_logme_has_a_bound_where_examples_repeat_in_many_dimensions() -> None:
    sample = sample_of(10, 50, 3)
    most = -(math.log(2 * math.pi * logme.LEAST_NOISE)) / 2
    for times in (1, 3, 1000):
        weights = torch.full((1, 10), float(times), dtype=torch.float64)
        assert float(logme.scores(sample, weights)) < most


@pytest.mark.parametrize("shape", SHAPES)
def test_label_cka_is_the_cosine_of_centred_grams(shape: tuple[int, int, int]) -> None:
    sample = sample_of(*shape)
    x, labels = arrays(sample)
    n = len(x)
    centring = np.eye(n) - 1 / n
    features, targets = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            features[i, j] = x[i] @ x[j]
            targets[i, j] = labels[i] == labels[j]
    features, targets = centring @ features @ centring, centring @ targets @ centring
    expected = (features * targets).sum() / (np.linalg.norm(features) * np.linalg.norm(targets))
    assert plain(label_cka, sample) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_h_score_is_the_trace_with_scikit_learns_shrinkage(shape: tuple[int, int, int]) -> None:
    sample = sample_of(*shape)
    x, labels = arrays(sample)
    x = x - x.mean(0)
    n, d = x.shape
    shrinkage = ledoit_wolf_shrinkage(x, assume_centered=True)
    assert 0 < shrinkage < 1
    covariance, between = np.zeros((d, d)), np.zeros((d, d))
    for i in range(n):
        mean = x[labels == labels[i]].mean(0)
        covariance += np.outer(x[i], x[i]) / n
        between += np.outer(mean, mean) / n
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)
    expected = (1 - shrinkage) * np.trace(np.linalg.inv(shrunk) @ between)
    assert plain(h_score, sample) == pytest.approx(expected, abs=1e-10)


def test_h_score_in_one_dimension_is_the_share_of_variance_between_the_classes() -> None:
    sample = sample_of(30, 1, 3)
    x, labels = arrays(sample)
    means = np.array([x[labels == label].mean() for label in labels])
    assert plain(h_score, sample) == pytest.approx(means.var() / x.var(), abs=1e-8)


def test_leep_is_its_definition_in_loops() -> None:
    sample = sample_of(25, 2, 3)
    assert sample.logits is not None
    theta = sample.logits.double().softmax(1).numpy()
    labels = sample.labels.numpy()
    joint = np.zeros((3, 5))
    for i, label in enumerate(labels):
        joint[label] += theta[i] / 25
    expected = 0.0
    for i, label in enumerate(labels):
        expected += math.log(sum(joint[label, z] / joint[:, z].sum() * theta[i, z] for z in range(5))) / 25
    assert plain(leep, sample) == pytest.approx(expected, abs=1e-12)


def test_loss_is_minus_the_mean() -> None:
    sample = sample_of(9, 2, 3)
    assert sample.losses is not None
    assert plain(loss, sample) == pytest.approx(-float(sample.losses.mean()), abs=1e-7)


@pytest.mark.parametrize("measure", HELD_OUT)
def test_a_probe_is_the_mean_of_what_is_held_out(measure: ModuleType) -> None:
    sample = take(sample_of(20, 5, 2), torch.arange(19))
    sample.labels[3] = 2
    sample = TargetFeatures(sample.vectors, sample.labels, 3)
    held_out = HELD_OUT[measure](sample.vectors, sample.labels, 3)
    assert held_out.isnan().tolist() == [i == 3 for i in range(19)]
    assert plain(measure, sample) == pytest.approx(float(held_out.nanmean()), abs=1e-12)
    draws = draws_of(19).double()
    expected = [float((draw * held_out).nansum() / (draw.sum() - draw[3])) for draw in draws]
    assert measure.scores(sample, draws).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", HELD_OUT)
def test_a_draw_that_a_probe_can_say_nothing_of_has_the_mean_of_all(measure: ModuleType) -> None:
    sample = TargetFeatures(sample_of(5, 3, 2).vectors, torch.tensor([0, 1, 1, 1, 2]), 3)
    only = torch.tensor([[2.0, 0, 0, 0, 3]], dtype=torch.float64)
    assert float(measure.scores(sample, only)) == pytest.approx(plain(measure, sample), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("measure", [*FEATURES, leep, loss])
def test_a_weight_is_a_repetition(measure: ModuleType, shape: tuple[int, int, int]) -> None:
    sample = sample_of(*shape)
    draws = draws_of(shape[0])
    repeated = [plain(measure, take(sample, torch.arange(shape[0]).repeat_interleave(draw))) for draw in draws]
    assert measure.scores(sample, draws.double()).tolist() == pytest.approx(repeated, abs=1e-7)


@pytest.mark.parametrize("measure", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_scale_do_not_matter(measure: ModuleType, shape: tuple[int, int, int]) -> None:
    sample = sample_of(*shape)
    noise = torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotated = 1e3 * sample.vectors @ torch.linalg.qr(noise).Q
    assert plain(measure, with_vectors(sample, rotated)) == pytest.approx(plain(measure, sample), abs=1e-8)


@pytest.mark.parametrize("measure", [*FEATURES, leep, loss])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_the_examples_does_not_matter(measure: ModuleType, shape: tuple[int, int, int]) -> None:
    sample = sample_of(*shape)
    shuffled = take(sample, torch.randperm(shape[0], generator=torch.Generator().manual_seed(2)))
    assert plain(measure, shuffled) == pytest.approx(plain(measure, sample), abs=1e-8)


@pytest.mark.parametrize("measure", [*FEATURES, *HELD_OUT])
def test_clearer_classes_score_higher(measure: ModuleType) -> None:
    found = [plain(measure, sample_of(100, 8, 4, signal=signal)) for signal in (0.0, 0.5, 1.5)]
    constant = with_vectors(sample_of(100, 8, 4), torch.ones(100, 8, dtype=torch.float64))
    assert plain(measure, constant) < found[1] < found[2]
    assert found[0] < found[1]


@pytest.mark.parametrize("measure", [label_cka, h_score])
def test_constant_features_score_nothing(measure: ModuleType) -> None:
    sample = sample_of(9, 4, 3)
    for value in (0.0, 0.1, 1e6):
        constant = with_vectors(sample, torch.full((9, 4), value, dtype=torch.float64))
        assert plain(measure, constant) == 0


@settings(small, max_examples=40)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 16),
    rank=st.integers(0, 4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    labelling=st.sampled_from(["one each", "two classes", "rare"]),
    seed=st.integers(0, 3),
)
def test_every_score_is_finite(
    n: int, d: int, rank: int, scale: float, offset: float, labelling: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, rank), (rank, d)))
    kinds = {"one each": torch.arange(n), "two classes": torch.arange(n) % 2, "rare": (torch.arange(n) == 0).long()}
    labels = kinds[labelling]
    logits = scale * torch.randn(n, 3, generator=generator)
    sample = TargetFeatures(scale * (left @ right + offset), labels, n, logits, logits.abs().sum(1))
    one, alone = torch.ones(1, n, dtype=torch.long), torch.eye(n, dtype=torch.long)[:1] * n
    draws = torch.cat([one, draws_of(n), alone]).double()
    for measure in EVERY:
        if measure in HELD_OUT and int(labels.bincount().max()) < 2:
            with pytest.raises(PimergeError, match="every class has one example"):
                measure.scores(sample, draws)
            continue
        found = measure.scores(sample, draws)
        assert found.shape == (len(draws),)
        assert found.dtype == torch.float64
        assert found.isfinite().all(), measure.__name__
    assert label_cka.scores(sample, draws).max() <= 1 + 1e-12
    assert h_score.scores(sample, draws).max() <= labels.max() + 1e-9


@pytest.mark.parametrize("measure", FEATURES)
def test_features_that_are_the_labels_are_finite(measure: ModuleType) -> None:
    labels = torch.arange(12) % 3
    sample = TargetFeatures(torch.eye(3, dtype=torch.float64)[labels], labels, 3)
    assert math.isfinite(plain(measure, sample))


@pytest.mark.parametrize("measure", [leep, loss])
def test_what_needs_a_head_says_so(measure: ModuleType) -> None:
    sample = TargetFeatures(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]), 2)
    with pytest.raises(PimergeError, match="head") as caught:
        plain(measure, sample)
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("measure", EVERY)
def test_they_leave_the_features_as_they_were(measure: ModuleType) -> None:
    sample = sample_of(12, 20, 3)
    before = sample.vectors.clone()
    first = plain(measure, sample)
    assert plain(measure, sample) == first
    assert torch.equal(sample.vectors, before)
