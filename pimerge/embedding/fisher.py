"""Per-example gradients → the diagonal of the empirical Fisher information.

    F_i = (1/M) Σ_m (∂ log p(y_m | x_m) / ∂φ_i)²        (π-Tuning, arXiv 2304.14381, eq. 3)

The square is taken per example: the square of a batch's mean gradient is another quantity. Layout: a
Linear's input X is (batch, …, d_in), the gradient of its output G is (batch, …, d_out), examples first.
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
# What rounding may change between one example alone and the same example in a batch, by the model's dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Fisher:
    """A diagonal Fisher information and how it was computed.

    Attributes:
        diagonal: parameter name → F, of the parameter's shape, in float32 (float64 for a float64 model).
        examples: M.
        route: ``rules`` (batched, per-example gradients of the factors) or ``loop`` (one example at a time).
        why_loop: the reason for ``loop``.
        deviation: largest relative deviation of a tensor from the loop on the first examples; None if unchecked.
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
    """The exact diagonal of the empirical Fisher information of some parameters.

    One forward and one backward per batch. Where no rule covers a parameter, or the batched result differs
    from the loop on the first two examples, every example is taken alone, which is always exact.

    Args:
        model: in eval mode; only ``parameters`` require gradients.
        parameters: name → parameter.
        batches: indices of the examples of each batch.
        make_batch: the batch of some examples, on the model's device; the first of its tensors has the examples first.
        nll: −log p(y|x) of each example of a batch, summed over its target tokens.
        check: compare with the loop first; off where the same was done for parameters of the same form.
        during: entered around the passes over the batches, the check left out.
        track: progress over examples.

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
        # each by itself, so without padding: that the batch pads them must change nothing
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
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    nll: NegativeLogLikelihood,
) -> dict[str, Tensor]:
    """Σ over all examples of the squared per-example gradients, in one forward and backward per batch.

    Covers the parameters that :mod:`pimerge.embedding.fisher_rules` has rules for, where a layer's input has the
    examples on its
    first axis, or as many rows of each example one after the other; each must be used once per example. The first
    tensor of a batch has as many rows as there are examples.
    """
    _reset(parameters)
    sums = _zeros(parameters)
    for batch in batches:
        with squaring(model, parameters, len(next(iter(batch.values())))):
            # backward, not autograd.grad: under reentrant checkpointing the latter finds nothing
            nll(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        # summed outside of .grad, where a parameter of 16 bits would soon swallow what is added
        for name, squares in _harvest(parameters).items():
            sums[name] += squares
    return sums


def fisher_by_loop(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    nll: NegativeLogLikelihood,
) -> dict[str, Tensor]:
    """The same sum from batches of one example each: slow and always exact."""
    _reset(parameters)
    sums = _zeros(parameters)
    for batch in batches:
        nll(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        for name, gradient in _harvest(parameters).items():
            sums[name] += gradient.square_()
    return sums


def _advancing(
    batches: Sequence[Sequence[int]],
    make_batch: Callable[[Sequence[int]], Batch],
    advance: Callable[[int], None],
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
    """Collect ``.grad`` after a backward pass; a parameter that no loss depends on has gradient 0."""
    found = {}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.detach().to(_sum_dtype(parameter))
    _reset(parameters)
    return found


def _deviation(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest relative Frobenius deviation; tensors that are zero up to rounding count against the whole."""
    whole = sum(float(value.square().sum()) for value in reference.values()) ** 0.5
    deviations = [
        float((found[name] - value).norm()) / max(float(value.norm()), 1e-6 * whole, 1e-300)
        for name, value in reference.items()
    ]
    return float(torch.tensor(deviations or [0.0]).max())  # NaN wins, unlike in Python's max


def _coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The least precise dtype of the model's weights."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(dtypes & set(_TOLERANCE), key=lambda dtype: _TOLERANCE[dtype], default=torch.float32)


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Squares are summed in float32, or in float64 for a float64 model."""
    return torch.promote_types(parameter.dtype, torch.float32)
