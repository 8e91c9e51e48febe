"""Best low-rank factors of a dense ΔW, with the error that they really have."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import F64, Truncated, Truncation

_DENSE = 768  # below this size the full decomposition takes less than a second
_FIRST_RANK = 32
_ROWS = 512  # of ΔW − B A that are in memory at once
_OVERSAMPLING = 16
_ITERATIONS = 4
_MARGIN = 4.0  # rounding errors of the checkpoint beside those of a single rounding, such as those of its arithmetic


def decompose(delta: Tensor, truncation: Truncation, dtype: torch.dtype, seed: int, noise: float = 0.0) -> Truncated:
    """Factors of the best approximation of a ΔW (d_out × d_in, float64), and its true error.

    Matrices whose smaller side is below 768, and those that need more than a quarter of it, are decomposed in full. For
    the others, a subspace iteration with oversampling (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4) finds the
    leading singular vectors. The error is that of the rounded factors: ‖ΔW − B A‖, computed from the matrix itself.

    Args:
        truncation: rank, and share of ‖ΔW‖² to keep. Without either, every direction above the rounding is kept.
        dtype: dtype of the factors.
        seed: seed of the random vectors.
        noise: standard deviation of the rounding error of an entry of ΔW.

    >>> delta = torch.outer(torch.arange(3.0), torch.arange(4.0)).double()
    >>> found = decompose(delta, Truncation(1), torch.float64, 0)
    >>> tuple(found.factors.A.shape), tuple(found.factors.B.shape), found.lost < 1e-20
    ((1, 4), (3, 1), True)
    """
    energy = float(delta.square().sum())
    goal = _Goal(truncation, energy, noise, tuple(delta.shape))
    left, singular, right = _leading(delta, goal, seed)
    kept = goal.kept(singular)
    root = singular[:kept].sqrt()
    A, B = (root[:, None] * right[:kept]).to(dtype), (left[:, :kept] * root).to(dtype)
    lost = 0.0
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        lost += float((delta[rows] - B[rows].to(F64) @ A.to(F64)).square().sum())
    return Truncated(Factors(A, B, 1.0), energy, lost)


def seed_of(seed: int, name: str) -> int:
    """The seed of a module, so that the result does not depend on which other modules there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class _Goal:
    """How many singular triples of a matrix are needed.

    Attributes:
        energy: ‖ΔW‖².
        noise: as for :func:`decompose`.
    """

    truncation: Truncation
    energy: float
    noise: float
    shape: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first rank to try."""
        small, limit = min(self.shape), self.truncation.rank
        if self.truncation.energy is None and (limit or not self.noise):
            return limit or small
        return min(_FIRST_RANK, limit or small)

    def kept(self, singular: Tensor) -> int:
        """The number of leading singular values to keep."""
        energy, limit = self.truncation.energy, self.truncation.rank
        possible = Truncation(limit).kept(singular)
        if energy is not None:
            missing = singular.square().cumsum(0) < energy * self.energy * (1 - 1e-12)
            return max(1, min(possible, 1 + int(missing.sum())))
        if limit is None and (above := self._above_rounding(singular)):
            return above
        return possible

    def is_reached(self, singular: Tensor) -> bool:
        """Whether no further singular value is needed."""
        energy, limit = self.truncation.energy, self.truncation.rank
        if limit is not None and len(singular) >= limit:
            return True
        if energy is not None:
            return float(singular.square().sum()) >= energy * self.energy
        return 0 < self._above_rounding(singular) < len(singular)

    def _above_rounding(self, singular: Tensor) -> int:
        """The number of singular values above those of a matrix of rounding errors, about noise · (√d_out + √d_in).

        It is 0 if more than rounding would be lost, since the change then has many small directions.
        """
        size = _MARGIN * self.noise
        above = max(1, int((singular > size * sum(map(math.sqrt, self.shape))).sum()))
        lost = self.energy - float(singular[:above].square().sum())
        return above if lost <= (2 * self.noise) ** 2 * math.prod(self.shape) else 0


def _leading(delta: Tensor, goal: _Goal, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples, at least as many as are needed."""
    small, rank = min(delta.shape), goal.first
    while small > _DENSE and 4 * rank <= small:
        found = _subspace(delta, rank, seed)
        if goal.is_reached(found[1][:rank]):
            return found
        rank = min(2 * rank, goal.truncation.rank or small)
    left, singular, right = torch.linalg.svd(delta, full_matrices=False)
    return left, singular, right


def _subspace(delta: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(*delta.shape, rank + max(_OVERSAMPLING, rank // 2))
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(delta @ torch.randn(delta.shape[1], columns, generator=generator, dtype=delta.dtype))[0]
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(delta.T @ Q)[0]
        Q = torch.linalg.qr(delta @ Q)[0]
    left, singular, right = torch.linalg.svd(Q.T @ delta, full_matrices=False)
    return Q @ left, singular, right
