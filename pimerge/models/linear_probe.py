"""Linear probes: how well a linear head, fitted on a few examples, predicts the labels of others.

Layout: features are (n × d) float64, one example per row; labels are (n) int64, 0 … classes − 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pimerge.core.errors import PimergeError
from pimerge.models.newton import LogisticLoss, minimise
from pimerge.tasks.sampling import stratified_folds

PENALTIES = (1e-2, 1e-1, 1.0)
PENALTY = 1e-1
FOLDS = 5
# A few examples are split into folds repeatedly: at most REPEATS times, until there are ENOUGH predictions.
REPEATS = 4
ENOUGH = 400

# Models compute in float32: differences below this fraction of the examples' norm are rounding errors.
_ROUNDING = 1e-6
# Directions with less than this fraction of the largest variance cannot change a penalised probe.
_NEGLIGIBLE = 1e-12
# Keeps the bias finite for a class without examples.
_BIAS_PENALTY = 1e-6


@dataclass(frozen=True)
class Probe:
    """A fitted linear head: p(y|x) = softmax((x − centre) · weights + bias).

    Attributes:
        centre: (d) mean of the training examples.
        weights: (d × classes) weights of unscaled features.
        bias: (classes) bias.
    """

    centre: Tensor
    weights: Tensor
    bias: Tensor

    def log_probabilities(self, vectors: Tensor) -> Tensor:
        """log p(y|x) in nats: (m × d) → (m × classes)."""
        return ((vectors - self.centre) @ self.weights + self.bias).log_softmax(1)


def fit_probe(vectors: Tensor, labels: Tensor, classes: int, penalty: float = 1.0) -> Probe:
    """Fit a multinomial logistic regression with an L2 penalty.

    It minimises Σ_i −log p(y_i|x_i) + penalty/2 · ‖W‖²_F, where x is centred by its mean and divided by the root
    mean square of ‖x − mean‖, so a penalty has the same effect for every model. The bias only has the penalty
    1e-6/2 · ‖b‖², which keeps it finite for a class without examples. If all examples have equal features, the probe
    predicts the class frequencies.

    Args:
        vectors: (n × d) float64.
        labels: (n) int64.
        classes: number of classes.
        penalty: a positive number.

    >>> x = torch.tensor([[-1.0], [-0.9], [0.9], [1.0]], dtype=torch.float64)
    >>> probe = fit_probe(x, torch.tensor([0, 0, 1, 1]), classes=2, penalty=0.1)
    >>> probe.log_probabilities(x).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    axes = _principal_axes(vectors)
    probe = next(_fit_each(vectors @ axes, labels, classes, [penalty]))
    return Probe(vectors.mean(0), axes @ probe.weights, probe.bias)


def held_out_log_likelihood(
    vectors: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
    seed: int = 0,
) -> Tensor:
    """log p(y_i|x_i) of each example by a probe that has not seen it, (n); see :func:`held_out_log_probabilities`."""
    found = held_out_log_probabilities(vectors, labels, classes, penalties, folds, seed)
    return found.gather(1, labels[:, None])[:, 0]


def held_out_probability(vectors: Tensor, labels: Tensor, classes: int, seed: int = 0) -> Tensor:
    """p(y_i|x_i) of each example by probes that have not seen it, averaged over several splits into folds.

    With few examples the score depends on the split into folds; averaging over several splits removes most of this
    variance. The penalty is always 0.1, since choosing it costs more than it gains.

    Args:
        vectors: (n × d) float64.
        labels: (n) int64.
        classes: number of classes of the target.
        seed: seed of the first split.

    Returns:
        (n) float64, 0 to 1; NaN for the only example of a class.

    >>> x = torch.tensor([[-1.0], [1.0], [-0.9], [0.9]], dtype=torch.float64)
    >>> held_out_probability(x, torch.tensor([0, 1, 0, 1]), classes=2).gt(0.8).tolist()
    [True, True, True, True]
    """
    repeats = max(1, min(REPEATS, ENOUGH // len(labels)))
    found = [
        held_out_log_likelihood(vectors, labels, classes, (PENALTY,), seed=seed + repeat).exp()
        for repeat in range(repeats)
    ]
    return torch.stack(found).mean(0)


def held_out_log_probabilities(
    vectors: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
    seed: int = 0,
) -> Tensor:
    """log p(y|x_i) of every class for each example, by a probe that has not seen it.

    The folds are stratified and depend only on labels and seed, so all models are compared on the same folds. Their
    number is at most the size of the largest class. All folds share one penalty: the one with the highest mean.

    Args:
        vectors: (n × d) float64.
        labels: (n) int64.
        classes: number of classes of the target.
        penalties: candidate penalties, each positive; see :func:`fit_probe`.
        folds: maximum number of folds, at least 2.
        seed: seed that shuffles the examples of each class.

    Returns:
        (n × classes) float64, in nats; NaN for the only example of a class, since a probe that has not seen the class
        cannot predict it.

    >>> x = torch.tensor([[-1.0], [1.0], [-0.9], [0.9], [0.0]], dtype=torch.float64)
    >>> held_out_log_probabilities(x, torch.tensor([0, 1, 0, 1, 2]), classes=3).argmax(1)[:4].tolist()
    [0, 1, 0, 1]
    """
    fold = probe_folds(labels, folds, seed)
    vectors = vectors @ _principal_axes(vectors)
    strongest_first = sorted(penalties, reverse=True)
    found = torch.full((len(strongest_first), len(labels), classes), torch.nan, dtype=torch.float64)
    for index in range(int(fold.max()) + 1):
        held = fold == index
        probes = _fit_each(vectors[~held], labels[~held], classes, strongest_first)
        for row, probe in zip(found, probes, strict=True):
            row[held] = probe.log_probabilities(vectors[held])
    likelihood = found.gather(2, labels[None, :, None].expand(len(found), -1, 1))[:, :, 0]
    return found[likelihood.nanmean(1).argmax()]


def in_row_space(vectors: Tensor) -> Tensor:
    """Express the examples in an orthonormal basis of their span, (n × d) → (n × min(n, d)); inner products are kept.

    >>> in_row_space(torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)).abs()
    tensor([[5.]], dtype=torch.float64)
    """
    n, d = vectors.shape
    return torch.linalg.qr(vectors.T, mode="r").R.T if n < d else vectors


def standardised(vectors: Tensor, weights: Tensor) -> Tensor:
    """Centre examples and scale them to root mean square norm 1; zeros if they do not differ.

    Args:
        vectors: (n × d) float64.
        weights: (n) weight of each example.

    >>> standardised(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([1.0, 1.0, 0.0]))[:2]
    tensor([[-1.],
            [ 1.]])
    """
    centre, scale = _centre_and_scale(vectors, weights)
    return (vectors - centre) / scale


def _centre_and_scale(vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d) and root mean square distance from it, as a divisor: infinite if the examples do not differ."""
    shares = weights / weights.sum()
    centre = shares @ vectors
    spread = (shares @ (vectors - centre).square().sum(1)).sqrt()
    size = (shares @ vectors.square().sum(1)).sqrt()
    return centre, torch.where(spread > _ROUNDING * size, spread, torch.inf)


def probe_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Assign each example to the fold that holds it out, (n); there are at most as many folds as in the largest class.

    The only example of a class has −1 and is never held out. It is an error if every class has one example.
    """
    largest = int(labels.bincount().max())
    if largest < 2:
        raise PimergeError(
            "every class has one example, so none can be held out to test a probe",
            "give at least two examples of a class, or use a measure that holds nothing out, such as logme",
        )
    return torch.tensor(stratified_folds(labels.tolist(), min(folds, largest), seed, level=True))


def _fit_each(vectors: Tensor, labels: Tensor, classes: int, penalties: Sequence[float]) -> Iterator[Probe]:
    """Fit a probe for each penalty, starting from the previous fit."""
    centre, scale = _centre_and_scale(vectors, torch.ones(len(labels), dtype=torch.float64))
    features = (vectors - centre) / scale
    features = torch.cat([features, torch.ones(len(labels), 1, dtype=torch.float64)], 1)
    targets = one_hot(labels, classes).T.double()
    found = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for penalty in penalties:
        ridge = torch.full((features.shape[1],), penalty, dtype=torch.float64)
        ridge[-1] = _BIAS_PENALTY
        found = minimise(LogisticLoss(features, features.T.contiguous(), targets, ridge), found)
        yield Probe(centre, found[:, :-1].T / scale, found[:, -1])


def _principal_axes(vectors: Tensor) -> Tensor:
    """Orthonormal directions (d × r, r ≤ min(n, d)) in which the examples vary.

    The optimum lies in their span, and its Hessian is nearly diagonal in this basis.
    """
    n, d = vectors.shape
    features = standardised(vectors, torch.ones(n, dtype=torch.float64))
    if n < d:
        variances, left = torch.linalg.eigh(features @ features.T)
        kept = variances > _NEGLIGIBLE * variances[-1]
        axes: Tensor = features.T @ left[:, kept] / variances[kept].sqrt()
    else:
        variances, directions = torch.linalg.eigh(features.T @ features)
        axes = directions[:, variances > _NEGLIGIBLE * variances[-1]]
    return axes
