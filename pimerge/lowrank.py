"""Sums of low-rank updates without their dense matrices.

All updates of one module lie in span(B_1..B_N) × span(A_1..A_N). With orthonormal bases U (d_out × R) and
V (d_in × R) from a QR of the stacked factors, every update is an R × R core C_n = Uᵀ ΔW_n V, and norms and
singular values of the cores are those of ΔW. So nothing of size d_out × d_in is formed, and the error of a
truncation is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pimerge.kinds.lora import Factors, LoraModule

if TYPE_CHECKING:
    from torch import Tensor

MergeFunction = Callable[["Tensor", "Tensor"], "Tensor"]
# Singular values below this share of the largest are rounding of the QR, not a direction of the update.
_NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class MergedModule:
    """One module's merged update, with scaling 1.

    Attributes:
        module: its layout, taken from an expert that has it.
        factors: A (r × d_in), B (d_out × r).
        energy: ‖ΔW‖² before the truncation.
        lost: the part of it that the truncation dropped.
    """

    module: LoraModule
    factors: Factors
    energy: float
    lost: float

    @property
    def rank(self) -> int:
        """r of the merged update."""
        return self.factors.A.shape[0]

    @property
    def error(self) -> float:
        """‖ΔW − ΔW_r‖ / ‖ΔW‖, in [0, 1]."""
        return relative_error([self])


def relative_error(modules: Sequence[MergedModule]) -> float:
    """The relative truncation error over some modules: √(Σ lost / Σ energy)."""
    energy = sum(module.energy for module in modules)
    return (sum(module.lost for module in modules) / energy) ** 0.5 if energy > 0 else 0.0


def merge_module(
    layout: LoraModule,
    parts: Sequence[Factors | None],
    weights: Sequence[float],
    method: MergeFunction,
    *,
    rank: int | None,
    dtype: torch.dtype,
) -> MergedModule:
    """Merge the updates of one module.

    Args:
        layout: the module's.
        parts: each expert's factors; None for an expert without this module.
        weights: one per expert.

    One expert at weight 1 comes back with its own factors, so it stays comparable with the experts of its init.
    """
    present = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part is not None]
    bias = _merged_bias([(part, weight) for part, weight in present], dtype)
    if len(present) == 1 and present[0][1] == 1.0 and (rank is None or rank >= len(present[0][0].A)):
        part = present[0][0]
        B = (part.B.double() * part.scaling).to(dtype)
        energy = float((_gram(part.B) * _gram(part.A.T)).sum()) * part.scaling**2
        return MergedModule(layout, Factors(part.A.to(dtype), B, 1.0, bias), energy, 0.0)
    U, V, cores = to_cores([part for part, _ in present])
    core = method(cores, torch.tensor([weight for _, weight in present], dtype=torch.float64))
    A, B, energy, lost = truncated_factors(core, U, V, rank)
    return MergedModule(layout, Factors(A.to(dtype), B.to(dtype), 1.0, bias), energy, lost)


def to_cores(parts: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor]:
    """Updates as small cores in a shared basis, exactly: ΔW_n = U C_n Vᵀ, in float64.

    Returns:
        U (d_out × R), V (d_in × R'), cores (experts, R, R'); R and R' are at most Σ r_n.

    >>> part = Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    >>> U, V, cores = to_cores([part, part])
    >>> torch.allclose(U @ cores[0] @ V.T, 2 * torch.ones(2, 3, dtype=torch.float64))
    True
    """
    U, RB = torch.linalg.qr(torch.cat([part.B for part in parts], 1).double())
    V, RA = torch.linalg.qr(torch.cat([part.A for part in parts]).double().T)
    ends = torch.tensor([part.A.shape[0] for part in parts]).cumsum(0).tolist()
    cores = [
        part.scaling * RB[:, end - len(part.A) : end] @ RA[:, end - len(part.A) : end].T
        for part, end in zip(parts, ends, strict=True)
    ]
    return U, V, torch.stack(cores)


def truncated_factors(core: Tensor, U: Tensor, V: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of a rank: B A ≈ U · core · Vᵀ, with the singular values shared evenly.

    Returns:
        A (r × d_in), B (d_out × r), ‖core‖² and the part of it that is lost (Eckart and Young, 1936). r is the
        number of directions that the update has, if that is less than ``rank``.
    """
    left, singular, right = torch.linalg.svd(core, full_matrices=False)
    directions = max(1, int((singular > _NEGLIGIBLE * singular[0]).sum()))
    kept = directions if rank is None else min(rank, directions)
    root = singular[:kept].sqrt()
    squares = singular.square()
    return (
        root[:, None] * (right[:kept] @ V.T),
        (U @ left[:, :kept]) * root,
        float(squares.sum()),
        float(squares[kept:directions].sum()),
    )


def _gram(B: Tensor) -> Tensor:
    return B.double().T @ B.double()


def _merged_bias(parts: Sequence[tuple[Factors, float]], dtype: torch.dtype) -> Tensor | None:
    biases = [weight * part.scaling * part.bias.double() for part, weight in parts if part.bias is not None]
    return torch.stack(biases).sum(0).to(dtype) if biases else None
