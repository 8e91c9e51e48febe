"""Put factors into the dtype of a result, and measure what rounding to a 16-bit dtype changes.

A bfloat16 number has 8 significant bits: multiplied by a scaling that is not a power of two, it is off by up to 0.4 %.
So the factors keep their numbers where one scaling fits all of them, and the config states that scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.lora_module import Factors

if TYPE_CHECKING:
    from torch import Tensor

_POWER_OF_TWO = 0.5  # the mantissa that math.frexp gives for one
# The error of a larger ΔW is measured on this number of rows and columns, so that it costs little.
_SAMPLE = 256


@dataclass(frozen=True)
class Rounded:
    """Factors in the dtype of the result.

    Attributes:
        energy: ‖ΔW‖² before they were rounded; 0 if no number changed.
        error: ‖ΔŴ − ΔW‖², the energy of the rounding error; 0 in float32 and float64, where it is not measured.
    """

    factors: Factors
    energy: float = 0.0
    error: float = 0.0


def rounded(factors: Factors, dtype: torch.dtype) -> Rounded:
    """Round the factors A and B to a dtype; see :class:`Rounded`.

    >>> one = Factors(torch.ones(1, 2), torch.tensor([[1.0], [1.001]]), 1.0)
    >>> found = rounded(one, torch.bfloat16)
    >>> f"{(found.error / found.energy) ** 0.5:.1e}"  # 1.001 becomes 1
    '7.1e-04'
    """
    A, B = factors.A, factors.B
    there = replace(factors, A=A.to(dtype), B=B.to(dtype))
    if not _is_narrow(dtype) or A.dtype == B.dtype == dtype:
        return Rounded(there)
    return Rounded(there, *_change(factors, there))


def side_by_side(parts: Sequence[Factors], coefficients: Sequence[float], dtype: torch.dtype) -> Rounded:
    """The factors of Σ c_n ΔW_n in a dtype: A below each other, and B, scaled, beside each other.

    Experts with coefficient 0 are left out, unless all have it.
    """
    used = [(part, c) for part, c in zip(parts, coefficients, strict=True) if c and len(part.A)]
    used = used or [(next((part for part in parts if len(part.A)), parts[0]), 0.0)]
    shared = shared_scaling([part.scaling * c for part, c in used], dtype)
    ratios = [part.scaling * c / shared for part, c in used]
    wide = torch.promote_types(dtype, torch.float32)
    rank = sum(len(part.A) for part, _ in used)
    A = torch.empty(rank, parts[0].A.shape[1], dtype=dtype)
    B = torch.empty(len(parts[0].B), rank, dtype=dtype)
    end = 0
    for (part, _), ratio in zip(used, ratios, strict=True):
        start, end = end, end + len(part.A)
        A[start:end] = part.A
        B[:, start:end] = part.B if ratio == 1 else part.B.to(wide) * ratio
    placed = Factors(A, B, shared)
    is_exact = all(abs(ratio) == 1 and _holds(dtype, part) for ratio, (part, _) in zip(ratios, used, strict=True))
    if is_exact or not _is_narrow(dtype):
        return Rounded(placed)
    down, across = _sampled(len(B)), _sampled(A.shape[1])
    exact = Factors(
        torch.cat([part.A[:, across].to(wide) for part, _ in used]),
        torch.cat([part.B[down].to(wide) * ratio for (part, _), ratio in zip(used, ratios, strict=True)], 1),
        shared,
    )
    energy, error = _change(exact, Factors(A[:, across], B[down], shared))
    share = exact.A.shape[1] * len(exact.B) / (A.shape[1] * len(B))
    return Rounded(placed, energy / share, error / share)


def shared_scaling(scalings: Sequence[float], dtype: torch.dtype) -> float:
    """The scaling that a result in a 16-bit dtype carries so that its factors are exact; 1 if none fits all.

    Signs and powers of two are exact in the factor B. Wider dtypes always have scaling 1.

    >>> [shared_scaling(scalings, torch.bfloat16) for scalings in ([16 / 3], [0.6, -0.3], [0.6, 0.4])]
    [5.333333333333333, 0.6, 1.0]
    >>> shared_scaling([16 / 3], torch.float32)
    1.0
    """
    largest = max(map(abs, scalings))
    if not _is_narrow(dtype) or not all(scalings):
        return 1.0
    return largest if all(math.frexp(abs(scaling) / largest)[0] == _POWER_OF_TWO for scaling in scalings) else 1.0


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize


def _holds(dtype: torch.dtype, part: Factors) -> bool:
    """Whether a dtype represents the numbers of both factors."""
    return all(torch.promote_types(dtype, factor.dtype) == dtype for factor in (part.A, part.B))


def _sampled(size: int) -> slice:
    """Evenly spaced places, of which there are at least :data:`_SAMPLE` or all."""
    return slice(None, None, max(1, size // _SAMPLE))


def _change(exact: Factors, there: Factors) -> tuple[float, float]:
    """‖ΔW‖² and ‖ΔŴ − ΔW‖² of the exact and the rounded factors.

    ΔŴ − ΔW = s · (B̂ − B) Â + s · B (Â − A) needs no dense matrix: its norm comes from the Gram matrices of the factors.
    """
    wide = torch.promote_types(exact.A.dtype, torch.float32)
    A, B = exact.A.to(wide), exact.B.to(wide)
    rounded_A = there.A.to(wide)
    change_A, change_B = rounded_A - A, there.B.to(wide) - B
    square = exact.scaling**2
    if change_A.any():
        error = _energy(torch.cat([change_B, B], 1), torch.cat([rounded_A, change_A]))
    elif change_B.any():
        error = _energy(change_B, A)
    else:
        return 0.0, 0.0
    return square * _energy(B, A), square * error


def _energy(B: Tensor, A: Tensor) -> float:
    """‖B A‖² = Σ BᵀB ∘ A Aᵀ."""
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
