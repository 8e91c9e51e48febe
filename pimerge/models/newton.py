"""Minimise the loss of a multinomial logistic regression with an L2 penalty.

Layout: weights are (classes × r), their last column the bias; features are (n × r), their last column all ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, zeros_like

_TOLERANCE = 1e-7  # of the gradient, per example
_MAX_NEWTON_STEPS = 100
_MAX_INNER_STEPS = 250
_LEAST_STEP = 1e-10


@dataclass(frozen=True)
class LogisticLoss:
    """Σ_i −log p(y_i|x_i) + ½ Σ ridge · weights², for weights (classes × r), the last column being the bias.

    Attributes:
        features: (n × r); the last column is all ones.
        across: (r × n) transposed copy; products with few classes are several times faster in this layout.
        targets: (classes × n) one-hot.
        ridge: (r) penalty of each column.
    """

    features: Tensor
    across: Tensor
    targets: Tensor
    ridge: Tensor

    def log_probabilities(self, weights: Tensor) -> Tensor:
        """log p(y|x) of every class, (classes × n)."""
        return (weights @ self.across).log_softmax(0)

    def objective(self, weights: Tensor, logs: Tensor) -> float:
        """The loss, from log p of these weights."""
        return float((self.ridge * weights.square()).sum() / 2 - (self.targets * logs).sum())

    def gradient(self, weights: Tensor, probabilities: Tensor) -> Tensor:
        """The gradient, (classes × r)."""
        return (probabilities - self.targets) @ self.features + self.ridge * weights

    def curvature(self, direction: Tensor, probabilities: Tensor) -> Tensor:
        """Multiply the Hessian with a direction."""
        moved = probabilities * (direction @ self.across)
        return (moved - probabilities * moved.sum(0)) @ self.features + self.ridge * direction

    def diagonal(self, probabilities: Tensor) -> Tensor:
        """The diagonal of the Hessian, (classes × r)."""
        return (probabilities * (1 - probabilities)) @ self.features.square() + self.ridge


def minimise(loss: LogisticLoss, weights: Tensor) -> Tensor:
    """Minimise by Newton's method with backtracking, starting from the given weights."""
    tolerance = _TOLERANCE * len(loss.features)
    logs = loss.log_probabilities(weights)
    value = loss.objective(weights, logs)
    for _ in range(_MAX_NEWTON_STEPS):
        probabilities = logs.exp()
        gradient = loss.gradient(weights, probabilities)
        if float(gradient.norm()) <= tolerance:
            break
        step = _newton_step(loss, probabilities, gradient, tolerance)
        slope = float((gradient * step).sum())
        length = 1.0
        while length > _LEAST_STEP:
            trial = weights + length * step
            logs = loss.log_probabilities(trial)
            found = loss.objective(trial, logs)
            if found <= value + 1e-4 * length * slope:
                break
            length /= 2
        else:  # the remaining decrease is below rounding
            break
        weights, value = trial, found
    return weights


def _newton_step(loss: LogisticLoss, probabilities: Tensor, gradient: Tensor, tolerance: float) -> Tensor:
    """Solve −H⁻¹ · gradient by conjugate gradients, preconditioned by H's diagonal, with increasing accuracy."""
    diagonal = loss.diagonal(probabilities)
    size = float(gradient.norm())
    goal = max(size * min(0.1, (size / len(loss.features)) ** 0.5), tolerance / 2)
    step = zeros_like(gradient)
    residual = -gradient
    direction = residual / diagonal
    product = float((residual * direction).sum())
    for _ in range(_MAX_INNER_STEPS):
        curved = loss.curvature(direction, probabilities)
        length = product / float((direction * curved).sum())
        step = step + length * direction
        residual = residual - length * curved
        if float(residual.norm()) <= goal:
            break
        scaled = residual / diagonal
        previous, product = product, float((residual * scaled).sum())
        direction = scaled + product / previous * direction
    return step
