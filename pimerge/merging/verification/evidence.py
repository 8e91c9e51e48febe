"""Measure how a tensor of a merge differs from the claimed sum of updates.

F is what was found (the merge minus the base), Δ_n are the experts' updates and C = Σ w_n Δ_n is the claim. An entry
may differ by the rounding of the written weight, which depends on the weight W and not on the update: half a unit in
the last place of W for each time that the weight was rounded, and the error of the arithmetic that computed C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pimerge.adapters.low_rank import inner_products, orthonormal_basis
from pimerge.merging.verification.compared_tensor import F64, ComparedTensor, Dense, LowRank, Part
from pimerge.merging.verification.rounding import ARITHMETIC, arithmetic_error, precision_of, spacing

_VISIBLE = 1.01  # a change of half a unit in the last place is lost or not, depending on the direction of rounding
_DITHERED = 0.6  # from this ratio of update to unit in the last place on, rounding is as good as independent of it
_DEVIATIONS = 5.0
_RECOMPUTED = 8  # roundings of a weight that is computed anew: the sum, its norm, a division, a product, the difference
_NEGLIGIBLE = 1e-10  # of the largest ‖Δ‖²: such a weight cannot be found
_NORM_ERROR = 2e-6  # relative, of a weight that was divided by its norm in float32


@dataclass(frozen=True)
class Evidence:
    """The measurements of one tensor.

    Attributes:
        gram: inner products of F and the Δ_n, (1 + experts, 1 + experts).
        difference: ‖F − C‖.
        tolerance: ‖·‖ of the largest rounding errors, entry by entry.
        fits: whether every entry of F − C is within the rounding error.
        unchanged: whether F is zero: the merge holds the base's numbers.
        visible: whether C changes any number of the base in the merge's dtype.
        finite: whether F holds neither NaN nor Inf.
        noise: standard deviation of the rounding error of an entry, if it is independent of the update; None if it
            is not, since the update is smaller than the unit in the last place.
        slack: relative error of the arithmetic.
        dtype: the dtype that the merge was rounded to.
    """

    gram: Tensor
    difference: float
    tolerance: float
    fits: bool
    unchanged: bool
    visible: bool
    finite: bool
    noise: float | None
    slack: float
    dtype: torch.dtype

    @property
    def found(self) -> float:
        """‖F‖."""
        return math.sqrt(max(0.0, float(self.gram[0, 0])))

    def claimed(self, weights: Sequence[float]) -> float:
        """‖Σ w_n Δ_n‖."""
        w = torch.tensor(list(weights), dtype=F64)
        return math.sqrt(max(0.0, float(w @ self.gram[1:, 1:] @ w)))

    @property
    def used(self) -> Tensor:
        """Which experts have an update that is not negligible beside the largest, so that its weight can be found."""
        energies = self.gram.diagonal()[1:]
        return energies > _NEGLIGIBLE * energies.max()

    def fitted(self) -> tuple[Tensor, Tensor]:
        """The weights that fit F best, min ‖F − Σ v_n Δ_n‖, and how far rounding may move each."""
        G = self.gram[1:, 1:]
        inverse = torch.linalg.pinv(G, hermitian=True, rtol=_NEGLIGIBLE)
        weights = inverse @ self.gram[1:, 0]
        error = (
            self.slack / 2 * weights.abs().max().clamp_min(1e-3)
            + _DEVIATIONS * (self.noise or 0.0) * inverse.diagonal().clamp_min(0).sqrt()
        )
        return weights, error

    def residual(self, weights: Tensor) -> float:
        """‖F − Σ v_n Δ_n‖."""
        v = torch.cat([torch.ones(1, dtype=F64), -weights])
        return math.sqrt(max(0.0, float(v @ self.gram @ v)))


@dataclass
class _Sums:
    """Sums over the blocks of a dense comparison."""

    gram: Tensor
    difference: float = 0.0
    tolerance: float = 0.0
    spaces: float = 0.0
    claim: float = 0.0
    fits: bool = True
    unchanged: bool = True
    visible: bool = False
    finite: bool = True
    roundings: int = 1
    dtype: torch.dtype = field(default=torch.float64)


def measure(comparison: ComparedTensor, weights: Sequence[float]) -> Evidence:
    """Measure one tensor: by small cores if all updates are low-rank, otherwise in one pass over the rows."""
    return _measure_cores(comparison, weights) if comparison.is_low_rank else _measure_rows(comparison, weights)


def _measure_cores(comparison: ComparedTensor, weights: Sequence[float]) -> Evidence:
    """Measure low-rank updates; no dense array is formed."""
    rows, columns = comparison.shape
    nothing = LowRank(torch.zeros(rows, 0, dtype=F64), torch.zeros(0, columns, dtype=F64), torch.float64)
    found = comparison.found or nothing
    parts = [part or nothing for part in comparison.parts]
    assert isinstance(found, LowRank)
    low: list[LowRank] = [found, *(part for part in parts if isinstance(part, LowRank))]
    if not all(bool(part.left.isfinite().all() and part.right.isfinite().all()) for part in low):
        return _not_finite(len(parts), found.dtype)
    _, left = orthonormal_basis([part.left for part in low])
    _, right = orthonormal_basis([part.right.T for part in low])
    signs = [1.0, *(-w for w in weights)]
    difference = sum(c * (a @ b.T) for c, a, b in zip(signs, left, right, strict=True))
    gram = inner_products([part.factors for part in low])
    norms = gram.diagonal().clamp_min(0).sqrt()
    # each product of a column and a row is rounded on its own
    terms = found.left.square().sum(0) * found.right.square().sum(1)
    rounding = 2 * torch.finfo(found.dtype).eps * math.sqrt(float(terms.sum()))
    arithmetic = ARITHMETIC * sum(abs(w) * float(norm) for w, norm in zip(weights, norms[1:], strict=True))
    tolerance, distance = rounding + arithmetic, float(torch.linalg.matrix_norm(difference))
    return Evidence(
        gram=gram,
        difference=distance,
        tolerance=tolerance,
        fits=distance <= tolerance,
        unchanged=not float(norms[0]),
        visible=True,
        finite=True,
        noise=None,
        slack=arithmetic_error(found.dtype),
        dtype=found.dtype,
    )


def _measure_rows(comparison: ComparedTensor, weights: Sequence[float]) -> Evidence:
    """Measure in blocks of rows, so that memory does not grow with the tensor."""
    count = len(comparison.parts)
    sums = _Sums(torch.zeros(1 + count, 1 + count, dtype=F64))
    for start, stop in comparison.blocks():
        _add(comparison, weights, sums, start, stop)
        if not sums.finite:
            return _not_finite(count, sums.dtype)
    entries = max(1, math.prod(comparison.shape))
    is_dithered = sums.claim >= _DITHERED**2 * sums.spaces
    return Evidence(
        gram=sums.gram,
        difference=math.sqrt(sums.difference),
        tolerance=math.sqrt(sums.tolerance),
        fits=sums.fits,
        unchanged=sums.unchanged,
        visible=sums.visible,
        finite=True,
        noise=math.sqrt(sums.roundings * sums.spaces / 12 / entries) if is_dithered else None,
        slack=arithmetic_error(sums.dtype),
        dtype=sums.dtype,
    )


def _add(comparison: ComparedTensor, weights: Sequence[float], sums: _Sums, start: int, stop: int) -> None:
    """Add the measurements of some rows."""
    found = comparison.found
    deltas = torch.stack([comparison.delta(part, start, stop) for part in (found, *comparison.parts)])
    if not bool(deltas[0].isfinite().all()):
        sums.finite = False
        return
    flat = deltas.flatten(1)
    sums.gram += flat @ flat.T
    claim = torch.einsum("n,nrc->rc", torch.tensor(list(weights), dtype=F64), deltas[1:])
    step, roundings, sums.dtype, same = _steps(comparison, weights, start, stop)
    slack = arithmetic_error(sums.dtype) * _magnitude(comparison, weights, start, stop)
    allowed = roundings / 2 * step + slack
    error = (deltas[0] - claim).abs()
    sums.difference += float(error.square().sum())
    sums.tolerance += float(allowed.square().sum())
    sums.spaces += float(step.square().sum())
    sums.claim += float(claim.square().sum())
    sums.fits &= bool((error <= allowed).all())
    sums.unchanged &= same
    sums.visible |= bool((claim.abs() > _VISIBLE / 2 * step + slack).any())
    sums.roundings = roundings


def _steps(
    comparison: ComparedTensor, weights: Sequence[float], start: int, stop: int
) -> tuple[Tensor, int, torch.dtype, bool]:
    """Units in the last place, the number of roundings, the dtype of the merge, and whether it equals the base."""
    found, base, columns = comparison.found, comparison.base, comparison.shape[1]
    assert base is not None
    if not isinstance(found, Dense):  # an adapter beside full checkpoints, whose own numbers were rounded
        step = torch.zeros(stop - start, columns, dtype=F64)
        for part, w in zip(comparison.parts, weights, strict=True):
            if isinstance(part, Dense):
                values = part.rows(start, stop, columns)
                step += abs(w) * spacing(values, precision_of(values))
        dtype = found.dtype if found is not None else torch.float64
        return step, 1, dtype, found is None or not bool(found.left.any() and found.right.any())
    values, before = found.rows(start, stop, columns), base.rows(start, stop, columns)
    dtype = precision_of(values)
    same = torch.equal(values, before.to(dtype).to(values.dtype))
    touching = sum(_roundings(part) for part in comparison.parts if part is not None)
    is_narrower = torch.finfo(dtype).eps > torch.finfo(base.dtype).eps
    step = spacing(torch.maximum(values.double().abs(), before.double().abs()), dtype)
    return step, max(1, touching) + is_narrower, dtype, same


def _roundings(part: Part) -> int:
    """How often a program rounds the weight when it adds an update."""
    return _RECOMPUTED if isinstance(part, LowRank) and part.is_recomputed else 1


def _magnitude(comparison: ComparedTensor, weights: Sequence[float], start: int, stop: int) -> Tensor:
    """Σ |w_n| ‖left_n‖ ‖right_n‖ by rows and columns, the scale of the errors of the arithmetic; F's too if low-rank.

    For a weight that is computed anew, the weight itself is part of it.
    """
    total = torch.zeros(stop - start, comparison.shape[1], dtype=F64)
    found = [(comparison.found, 1.0)] if isinstance(comparison.found, LowRank) else []
    for part, w in [*zip(comparison.parts, weights, strict=True), *found]:
        if isinstance(part, LowRank):
            rows, columns = part.left[start:stop].norm(dim=1), part.right.norm(dim=0)
            total.addr_(rows, columns, alpha=abs(w))
            if part.is_recomputed and comparison.base is not None:
                before = comparison.base.rows(start, stop, comparison.shape[1]).to(F64)
                typical = before.square().mean().sqrt() + (part.left[start:stop] @ part.right).square().mean().sqrt()
                total += abs(w) * _NORM_ERROR / ARITHMETIC * (before.abs() + typical)
        elif part is not None:
            total += abs(w) * comparison.delta(part, start, stop).abs()
    return total


def _not_finite(count: int, dtype: torch.dtype) -> Evidence:
    nan = math.nan
    gram = torch.full((1 + count, 1 + count), nan, dtype=F64)
    return Evidence(gram, nan, nan, False, False, True, False, None, nan, dtype)
