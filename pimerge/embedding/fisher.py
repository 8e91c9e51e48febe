"""Diagonal of the empirical Fisher information from per-example gradients.

    F_i = (1/M) Σ_m (∂ log p(y_m | x_m) / ∂φ_i)²        (π-Tuning, arXiv 2304.14381, eq. 3)

The square is taken per example; the square of a batch's mean gradient is a different quantity. Layout: the input X of
a Linear layer is (batch, …, d_in) and the gradient G of its output is (batch, …, d_out), with the examples first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pimerge.core.progress import Track, silent
from pimerge.embedding.fisher_rules import covered, squaring

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.examples import Batch

NegativeLogLikelihood = Callable[[nn.Module, "Batch"], "Tensor"]

CHECKED_EXAMPLES = 2
# Relative deviation that rounding may cause between an example alone and in a batch, by the model's dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Fisher:
    """A diagonal Fisher information and how it was computed.

    Attributes:
        diagonal: parameter name → F in the parameter's shape, float32 (float64 for a float64 model).
        examples: the number of examples, M.
        route: ``rules`` (batched) or ``loop`` (one example at a time).
        why_loop: the reason for ``loop``; empty for ``rules``.
        deviation: largest relative deviation of a tensor from the loop on the first examples; None if not checked.
    """

    diagonal: dict[str, Tensor]
    examples: int
    route: str
    why_loop: str
    deviation: float | None


def diagonal_fisher(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Sequence[int]],
    make_batch: Callable[[Sequence[int]], Batch],
    nll: NegativeLogLikelihood,
    *,
    check: bool = True,
    during: AbstractContextManager[None] | None = None,
    track: Track = silent,
) -> Fisher:
    """Compute the exact diagonal of the empirical Fisher information of some parameters.

    It takes one forward and one backward pass per batch. If no rule covers a parameter, or if the batched result
    differs from the loop on the first two examples, each example is processed alone, which is always exact.

    Args:
        model: in eval mode; only ``parameters`` require gradients.
        parameters: name → parameter.
        batches: indices of the examples of each batch.
        make_batch: builds the batch of the given examples on the model's device; in its first tensor the first axis
            is the examples.
        nll: returns −log p(y|x) of each example of a batch, summed over its target tokens.
        check: compare with the loop first; not needed if parameters of the same form were checked before.
        during: context entered for the passes over the batches, but not for the check.
        track: shows progress over examples.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> xs = torch.tensor([[1.0], [2.0]])
    >>> result = diagonal_fisher(layer, dict(layer.named_parameters()), [[0, 1]],
    ...                          lambda ids: {"x": xs[list(ids)]}, lambda m, b: m(b["x"])[:, 0])
    >>> result.route, result.diagonal["weight"].item()  # mean of 1² and 2²
    ('rules', 2.5)
    """
    alone = [[index] for index in sorted(itertools.chain.from_iterable(batches))]
    deviation, why_loop = None, ""
    uncovered = sorted(parameters.keys() - covered(model, parameters))
    if uncovered:
        why_loop = f"no rule covers {', '.join(uncovered[:3])}" + (" …" if len(uncovered) > 3 else "")
    elif check:
        first = [index for [index] in alone[:CHECKED_EXAMPLES]]
        # single examples have no padding, so this also checks that padding in a batch changes nothing
        reference = fisher_by_loop(model, parameters, (make_batch([index]) for index in first), nll)
        deviation = _deviation(fisher_by_rules(model, parameters, [make_batch(first)], nll), reference)
        if not deviation <= _TOLERANCE[_coarsest_dtype(model)]:
            why_loop = f"the batched gradients of the first examples deviate by {deviation:.1e}"
    total = len(alone)
    with track("Fisher", total, "examples") as advance, during or nullcontext():
        if why_loop:
            sums = fisher_by_loop(model, parameters, _advancing(alone, make_batch, advance), nll)
        else:
            sums = fisher_by_rules(model, parameters, _advancing(batches, make_batch, advance), nll)
    diagonal = {name: value / total for name, value in sums.items()}
    return Fisher(diagonal, total, "loop" if why_loop else "rules", why_loop, deviation)


def fisher_by_rules(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], nll: NegativeLogLikelihood
) -> dict[str, Tensor]:
    """Sum the squared per-example gradients over all examples, with one forward and backward pass per batch.

    It covers the parameters that :mod:`pimerge.embedding.fisher_rules` has rules for. The first axis of a layer's input
    must be the examples, or equally many consecutive rows for each example, and each layer must be used once per
    example. The first tensor of a batch has one row per example.
    """
    _reset(parameters)
    sums = _zeros(parameters)
    for batch in batches:
        with squaring(model, parameters, len(next(iter(batch.values())))):
            # autograd.grad finds no gradients under reentrant checkpointing; backward does
            nll(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        # summed outside of .grad, which for 16-bit parameters would lose small terms to rounding
        for name, squares in _harvest(parameters).items():
            sums[name] += squares
    return sums


def fisher_by_loop(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], nll: NegativeLogLikelihood
) -> dict[str, Tensor]:
    """Compute the same sum from batches of one example each, which is slow and always exact."""
    _reset(parameters)
    sums = _zeros(parameters)
    for batch in batches:
        nll(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        for name, gradient in _harvest(parameters).items():
            sums[name] += gradient.square_()
    return sums


def _advancing(
    batches: Sequence[Sequence[int]], make_batch: Callable[[Sequence[int]], Batch], advance: Callable[[int], None]
) -> Iterator[Batch]:
    for indices in batches:
        yield make_batch(indices)
        advance(len(indices))


def _reset(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _zeros(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(parameter, dtype=_sum_dtype(parameter)) for name, parameter in parameters.items()}


def _harvest(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Take the gradients out of ``.grad``; a parameter on which no loss depends has the gradient 0."""
    found = {}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.detach().to(_sum_dtype(parameter))
    _reset(parameters)
    return found


def _deviation(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return the largest relative deviation in Frobenius norm; tensors that are zero up to rounding are measured
    against the norm of all tensors."""
    whole = sum(float(value.square().sum()) for value in reference.values()) ** 0.5
    deviations = [
        float((found[name] - value).norm()) / max(float(value.norm()), 1e-6 * whole, 1e-300)
        for name, value in reference.items()
    ]
    return float(torch.tensor(deviations or [0.0]).max())  # NaN wins, unlike in Python's max


def _coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the least precise dtype of the model's weights."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(dtypes & set(_TOLERANCE), key=lambda dtype: _TOLERANCE[dtype], default=torch.float32)


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype in which squares are summed: float32, or float64 for a float64 model."""
    return torch.promote_types(parameter.dtype, torch.float32)
