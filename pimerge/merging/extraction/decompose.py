"""Best low-rank factors of a dense ΔW, with the error that they really have."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import EVERYTHING, F64, Truncated, Truncation

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
    left, singular, right = _leading(delta, truncation, energy, seed)
    kept = truncation.kept(singular) if truncation.energy is None else _enough(singular, truncation, energy)
    if truncation == EVERYTHING and noise:
        kept = _above_rounding(singular, delta.shape, noise, kept)
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


def _leading(delta: Tensor, truncation: Truncation, energy: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples, at least as many as are needed."""
    small = min(delta.shape)
    rank = truncation.rank or (small if truncation.energy is None else _FIRST_RANK)
    while small > _DENSE and 4 * rank <= small:
        found = _subspace(delta, rank, seed)
        reached = float(found[1][:rank].square().sum())
        if truncation.energy is None or rank == truncation.rank or reached >= truncation.energy * energy:
            return found
        rank = min(2 * rank, truncation.rank or small)
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


def _enough(singular: Tensor, truncation: Truncation, energy: float) -> int:
    """The least rank that keeps the share of the energy, at most the rank of the truncation."""
    assert truncation.energy is not None
    missing = singular.square().cumsum(0) < truncation.energy * energy * (1 - 1e-12)
    enough = min(replace(truncation, energy=None).kept(singular), 1 + int(missing.sum()))
    return max(1, enough)


def _above_rounding(singular: Tensor, shape: torch.Size, noise: float, kept: int) -> int:
    """The number of singular values above those of a matrix of rounding errors, about noise · (√d_out + √d_in).

    If more is lost than rounding explains, the change has many small directions, and all are kept.
    """
    edge = _MARGIN * noise * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    above = max(1, int((singular > edge).sum()))
    lost = float(singular[above:].square().sum())
    return above if lost <= (_MARGIN * noise) ** 2 * shape[0] * shape[1] else kept
