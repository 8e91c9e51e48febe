"""Sums of low-rank updates without their dense matrices.

All updates of one module lie in span(B_1..B_N) × span(A_1..A_N). With orthonormal bases U (d_out × R) and
V (d_in × R') of the stacked factors, every update is an R × R' core C_n = Uᵀ ΔW_n V, and norms, inner
products and singular values of the cores are those of ΔW. So nothing of size d_out × d_in is formed, and the
error of a truncation is known exactly. Everything here is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.lora_module import Factors
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor

F64 = torch.float64
DEFAULT_ENERGY = 0.99
# Singular values below this share of the largest are rounding, not a direction of the update.
_NEGLIGIBLE = 1e-10
# From so many columns on, a Gram matrix's eigenvectors are several times faster than a QR; they are as good
# where no direction is weaker than this share of the strongest (squared), and QR takes the other cases.
_GRAM_COLUMNS = 128
_GRAM_CONDITION = 1e-6


@dataclass(frozen=True)
class Truncation:
    """How much of an update its factors keep.

    Attributes:
        rank: most directions; None for all.
        energy: keep the least rank with this share of ‖ΔW‖² (at most ``rank``); None for no such choice.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise PimergeError(f"--rank is {self.rank}, expected at least 1, max or auto")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise PimergeError(f"--energy is {self.energy}", "expected a share of ‖ΔW‖² above 0, up to 1")

    def kept(self, singular: Tensor) -> int:
        """How many of some singular values (descending) to keep; rounding noise is never kept.

        >>> Truncation(energy=0.85).kept(torch.tensor([3.0, 1.0, 0.1], dtype=F64))
        1
        """
        directions = max(1, int((singular > _NEGLIGIBLE * singular[0]).sum()))
        if self.energy is not None:
            shares = singular[:directions].square().cumsum(0)
            directions = min(directions, 1 + int((shares < self.energy * shares[-1] * (1 - 1e-12)).sum()))
        return directions if self.rank is None else min(self.rank, directions)


EVERYTHING = Truncation()


@dataclass(frozen=True)
class Truncated:
    """Factors of an update, and the energy that a truncation dropped.

    Attributes:
        factors: A (r × d_in), B (d_out × r), scaling 1.
        energy: ‖ΔW‖² before the truncation; 0 where nothing had to be computed for it.
        lost: the part of it that the truncation dropped.
    """

    factors: Factors
    energy: float
    lost: float


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the columns of a matrix: U = ``stack`` · ``change``, (d × R).

    U itself is large and often not needed: ``times`` multiplies from the right first.
    """

    stack: Tensor
    change: Tensor

    def times(self, X: Tensor) -> Tensor:
        """U X, (d × k) for X (R × k)."""
        return self.stack @ (self.change @ X)

    def rotated(self, rotation: Tensor) -> Basis:
        """The basis U · rotation."""
        return Basis(self.stack, self.change @ rotation)


@dataclass(frozen=True)
class Cores:
    """The updates of one module in bases that they share: ΔW_n = U C_n Vᵀ.

    Attributes:
        U, V: bases of the outputs (d_out × R) and of the inputs (d_in × R').
        left, right: each expert's factors in them: C_n = left_n right_nᵀ, (R × r_n) and (R' × r_n).
    """

    U: Basis
    V: Basis
    left: list[Tensor]
    right: list[Tensor]

    def stacked(self, dtype: torch.dtype = F64) -> Tensor:
        """C, (experts, R, R'), computed in a dtype."""
        pairs = zip(self.left, self.right, strict=True)
        return torch.stack([left.to(dtype) @ right.to(dtype).T for left, right in pairs])

    def summed(self, coefficients: Sequence[float]) -> Tensor:
        """Σ c_n C_n, (R, R'), without the single cores."""
        scaled = [c * left for c, left in zip(coefficients, self.left, strict=True)]
        return torch.cat(scaled, 1) @ torch.cat(self.right, 1).T

    def rotated(self, P: Tensor, Q: Tensor) -> Cores:
        """The same updates in the bases U P and V Q."""
        return Cores(
            self.U.rotated(P),
            self.V.rotated(Q),
            [P.T @ left for left in self.left],
            [Q.T @ right for right in self.right],
        )

    def canonical(self) -> Cores:
        """In the singular vectors of the experts side by side and one above the other.

        They depend on the updates alone, up to sign: neither on the experts' order nor on how each update is
        split into B and A. (Where several singular values are equal, their vectors are not determined.)
        """
        pairs = list(zip(self.left, self.right, strict=True))
        rows = torch.cat([left @ (right.T @ right) for left, right in pairs], 1) @ torch.cat(self.left, 1).T
        columns = torch.cat([right @ (left.T @ left) for left, right in pairs], 1) @ torch.cat(self.right, 1).T
        return self.rotated(_principal(rows), _principal(columns))

    def reference(self) -> Cores:
        """In the singular vectors of the stacked factors B and A (Core Space, arXiv 2509.17786, eq. 5)."""
        left, right = torch.cat(self.left, 1), torch.cat(self.right, 1)
        return self.rotated(_principal(left @ left.T), _principal(right @ right.T))


def orthonormal_basis(stacks: Sequence[Tensor]) -> tuple[Basis, list[Tensor]]:
    """An orthonormal basis U of some matrices side by side, and the coordinates K_n of each in it: M_n = U K_n.

    Args:
        stacks: (d × r_n) each, in float64.
    """
    sizes = [part.shape[1] for part in stacks]
    stack = torch.cat(list(stacks), 1)
    # columns of unit norm: an expert whose update is small loses no digits beside a large one
    norms = torch.linalg.vector_norm(stack, dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    stack /= norms
    if _GRAM_COLUMNS <= stack.shape[1] <= stack.shape[0]:
        values, vectors = torch.linalg.eigh(stack.T @ stack)
        if values[0] > _GRAM_CONDITION * values[-1]:
            root = values.sqrt()
            return Basis(stack, vectors / root), list((root[:, None] * vectors.T * norms).split(sizes, 1))
    Q, R = torch.linalg.qr(stack)
    return Basis(Q, torch.eye(Q.shape[1], dtype=F64)), list((R * norms).split(sizes, 1))


def to_cores(parts: Sequence[Factors]) -> Cores:
    """Updates as small cores, exactly: ΔW_n = U C_n Vᵀ; R and R' are at most Σ r_n.

    >>> part = Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    >>> cores = to_cores([part, part])
    >>> torch.allclose(cores.U.times(cores.V.times(cores.stacked()[0].T).T), 2 * torch.ones(2, 3, dtype=F64))
    True
    """
    U, left = orthonormal_basis([part.scaling * part.B.to(F64) for part in parts])
    V, right = orthonormal_basis([part.A.to(F64).T for part in parts])
    return Cores(U, V, left, right)


def truncated(core: Tensor, cores: Cores, truncation: Truncation) -> Truncated:
    """The best factors of a rank: B A ≈ U · core · Vᵀ, with the singular values shared evenly.

    What is lost is known from the singular values (Eckart and Young, 1936).
    """
    left, singular, right = _svd(core.to(F64))
    kept = truncation.kept(singular)
    root = singular[:kept].sqrt()
    factors = Factors(root[:, None] * cores.V.times(right[:kept].T).T, cores.U.times(left[:, :kept]) * root, 1.0)
    return Truncated(factors, *_energies(singular, kept))


def truncated_dense(delta: Tensor, truncation: Truncation) -> Truncated:
    """As :func:`truncated`, for a dense ΔW (d_out × d_in)."""
    left, singular, right = _svd(delta.to(F64))
    kept = truncation.kept(singular)
    root = singular[:kept].sqrt()
    return Truncated(Factors(root[:, None] * right[:kept], left[:, :kept] * root, 1.0), *_energies(singular, kept))


def inner_products(parts: Sequence[Factors]) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ = s_i s_j Σ (B_iᵀB_j ∘ A_iA_jᵀ), (experts, experts), without a dense ΔW.

    >>> inner_products([Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)]).item()  # ‖2·ones(2, 3)‖²
    24.0
    """
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part.A) for part in parts]))
    B = torch.cat([part.scaling * part.B.to(F64) for part in parts], 1)
    A = torch.cat([part.A.to(F64) for part in parts])
    products = (B.T @ B) * (A @ A.T)
    sums = products.new_zeros(len(parts), len(products)).index_add_(0, owner, products)
    return products.new_zeros(len(parts), len(parts)).index_add_(1, owner, sums)


def weighted_sum(
    parts: Sequence[Factors], coefficients: Sequence[float], truncation: Truncation, dtype: torch.dtype
) -> Truncated:
    """Factors of Σ c_n ΔW_n, in a dtype or a wider one; the biases are not summed here.

    Without a truncation they are the experts' factors side by side (rank Σ r_n) where a matrix of that shape can
    have such a rank: nothing is computed, and nothing rounded but once.
    """
    rank = sum(len(part.A) for part, c in zip(parts, coefficients, strict=True) if c)
    if truncation == EVERYTHING and rank <= min(len(parts[0].B), parts[0].A.shape[1]):
        return Truncated(_side_by_side(parts, coefficients, dtype), 0.0, 0.0)
    cores = to_cores(parts)
    return truncated(cores.summed(coefficients), cores, truncation)


def weighted_bias(parts: Sequence[Factors], coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Σ c_n s_n bias_n, (d_out); zero for an update without a bias."""
    total = torch.zeros(len(parts[0].B), dtype=F64)
    for part, c in zip(parts, coefficients, strict=True):
        if part.bias is not None:
            total += c * part.scaling * part.bias.to(F64)
    return total.to(dtype)


def _side_by_side(parts: Sequence[Factors], coefficients: Sequence[float], dtype: torch.dtype) -> Factors:
    """The A as they are, the B scaled; an expert with the coefficient 0 is left out, unless all are."""
    used = [(part, c) for part, c in zip(parts, coefficients, strict=True) if c and len(part.A)]
    used = used or [(next((part for part in parts if len(part.A)), parts[0]), 0.0)]
    wide = torch.promote_types(dtype, torch.float32)
    rank = sum(len(part.A) for part, _ in used)
    A = torch.empty(rank, parts[0].A.shape[1], dtype=dtype)
    B = torch.empty(len(parts[0].B), rank, dtype=dtype)
    start = 0
    for part, c in used:
        end = start + len(part.A)
        A[start:end] = part.A
        B[:, start:end] = part.B.to(wide) * (part.scaling * c)
        start = end
    return Factors(A, B, 1.0)


def _principal(gram: Tensor) -> Tensor:
    """The eigenvectors of a Gram matrix, strongest first."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, singular, right


def _energies(singular: Tensor, kept: int) -> tuple[float, float]:
    squares = singular.square()
    directions = Truncation().kept(singular)
    return float(squares.sum()), float(squares[kept:directions].sum())
