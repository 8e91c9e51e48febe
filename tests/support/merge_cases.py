"""Updates of low rank with their cores, and masks of what a random method keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from pimerge.merging.methods import _drop
from tests.support.numerics import normal

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """ΔW_n = B_n A_n of one module, with orthonormal bases U, V of what all B and all A span.

    Attributes:
        factors: (B_n, A_n) per expert.
    """

    factors: tuple[tuple[Tensor, Tensor], ...]

    @property
    def deltas(self) -> Tensor:
        """ΔW: (experts, d_out, d_in)."""
        return torch.stack([B @ A for B, A in self.factors])

    @property
    def limit(self) -> int:
        """min(d_out, d_in)."""
        return min(self.deltas.shape[1:])

    @property
    def U(self) -> Tensor:
        """(d_out, R)."""
        return torch.linalg.qr(torch.cat([B for B, _ in self.factors], dim=1)).Q

    @property
    def V(self) -> Tensor:
        """(d_in, R')."""
        return torch.linalg.qr(torch.cat([A for _, A in self.factors]).mT).Q

    @property
    def cores(self) -> Tensor:
        """UᵀΔW_nV: (experts, R, R')."""
        return self.U.mT @ self.deltas @ self.V


def low_rank(
    ranks: Sequence[int] = (2, 3, 1), shape: tuple[int, int] = (12, 9), scales: Sequence[float] = (), seed: int = 0
) -> Case:
    """One expert per rank; rank 0 is a zero update."""
    factors = []
    for n, (rank, scale) in enumerate(zip(ranks, scales or [1.0] * len(ranks), strict=True)):
        B = scale * normal(shape[0], max(1, rank), seed=seed + 2 * n).to(F64)
        A = normal(max(1, rank), shape[1], seed=seed + 2 * n + 1).to(F64)
        factors.append((B * (rank > 0), A))
    return Case(tuple(factors))


@st.composite
def cases(draw: st.DrawFn, most: int = 4) -> Case:
    """Any number of experts up to ``most``, of any rank, shape and scale."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=most))
    scales = [10.0 ** draw(st.integers(-2, 2)) for _ in ranks]
    return low_rank(ranks, shape, scales, seed=draw(st.integers(0, 1000)))


def weights_of(count: int, seed: int = 0) -> Tensor:
    """Unequal positive weights that do not sum to 1."""
    return 0.2 + torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(count: int) -> list[Generator]:
    """One generator per expert."""
    return [Generator().manual_seed(100 + n) for n in range(count)]


def kept_masks(deltas: Tensor, density: float) -> Tensor:
    """What ``seeded`` generators keep at one density."""
    return _drop.drop(torch.ones_like(deltas), density, seeded(len(deltas))) > 0


def close(found: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    """‖found − expected‖ ≤ relative · ‖expected‖."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert float((found.double() - expected).norm()) <= relative * float(expected.norm()) + 1e-300
