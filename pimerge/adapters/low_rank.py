"""Sum low-rank updates without forming dense matrices.

All updates of one module lie in span(B_1..B_N) × span(A_1..A_N). With orthonormal bases U (d_out × R) and
V (d_in × R') of the stacked factors, every update is an R × R' core C_n = Uᵀ ΔW_n V with the norm, inner
products and singular values of ΔW_n. No matrix of size d_out × d_in is formed, and the error of a truncation
is known exactly. All computations are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.rounding import side_by_side
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor

F64 = torch.float64
DEFAULT_ENERGY = 0.99
# Singular values below this fraction of the largest are rounding errors.
_NEGLIGIBLE = 1e-10
# With at least this many columns, the eigenvectors of the Gram matrix are several times faster than QR. They are as
# accurate if the smallest eigenvalue is above this fraction of the largest; otherwise QR is used.
_GRAM_COLUMNS = 128
_GRAM_CONDITION = 1e-6


@dataclass(frozen=True)
class Truncation:
    """How far an update is truncated.

    Attributes:
        rank: the largest rank; None for no limit.
        energy: keep the smallest rank with this fraction of ‖ΔW‖² (at most ``rank``); None keeps all directions.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise PimergeError(f"--rank is {self.rank}, expected at least 1, max or auto")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise PimergeError(f"--energy is {self.energy}", "expected a fraction of ‖ΔW‖² above 0 and at most 1")

    def kept(self, singular: Tensor) -> int:
        """The number of singular values (descending) to keep; rounding errors are never kept.

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
        factors: A (r × d_in), B (d_out × r), with their scaling.
        energy: ‖ΔW‖² before the truncation; 0 if nothing was truncated or rounded.
        lost: the part of the energy that the truncation dropped.
        rounding: the energy of the error from rounding to a 16-bit dtype.
    """

    factors: Factors
    energy: float
    lost: float
    rounding: float = 0.0


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the columns of a matrix: U = ``stack`` · ``change``, (d × R).

    U itself is large and often not needed, so ``times`` multiplies from the right first.
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
    """The updates of one module in shared bases: ΔW_n = U C_n Vᵀ.

    Attributes:
        U, V: bases of the outputs (d_out × R) and of the inputs (d_in × R').
        left, right: each expert's factors in these bases: C_n = left_n right_nᵀ, (R × r_n) and (R' × r_n).
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
        """Σ c_n C_n, (R, R'), without forming the individual cores."""
        scaled = [c * left for c, left in zip(coefficients, self.left, strict=True)]
        return torch.cat(scaled, 1) @ torch.cat(self.right, 1).T

    def rotated(self, P: Tensor, Q: Tensor) -> Cores:
        """Change the bases to U P and V Q."""
        return Cores(
            self.U.rotated(P),
            self.V.rotated(Q),
            [P.T @ left for left in self.left],
            [Q.T @ right for right in self.right],
        )

    def canonical(self) -> Cores:
        """Change to the singular vectors of the updates side by side and stacked.

        Up to sign, they depend only on the updates, not on the experts' order or on how each update is split into B
        and A. (The vectors of equal singular values are not unique.)
        """
        pairs = list(zip(self.left, self.right, strict=True))
        rows = torch.cat([left @ (right.T @ right) for left, right in pairs], 1) @ torch.cat(self.left, 1).T
        columns = torch.cat([right @ (left.T @ left) for left, right in pairs], 1) @ torch.cat(self.right, 1).T
        return self.rotated(_principal(rows), _principal(columns))

    def reference(self) -> Cores:
        """Change to the singular vectors of the stacked factors B and A (Core Space, arXiv 2509.17786, eq. 5)."""
        left, right = torch.cat(self.left, 1), torch.cat(self.right, 1)
        return self.rotated(_principal(left @ left.T), _principal(right @ right.T))


def orthonormal_basis(stacks: Sequence[Tensor]) -> tuple[Basis, list[Tensor]]:
    """Find an orthonormal basis U of matrices side by side, and the coordinates K_n of each: M_n = U K_n.

    Args:
        stacks: (d × r_n) each, in float64.
    """
    sizes = [part.shape[1] for part in stacks]
    stack = torch.cat(list(stacks), 1)
    # columns of unit norm, so that a small update keeps its precision beside a large one
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
    """Express updates exactly as small cores: ΔW_n = U C_n Vᵀ, with R and R' at most Σ r_n.

    >>> part = Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    >>> cores = to_cores([part, part])
    >>> torch.allclose(cores.U.times(cores.V.times(cores.stacked()[0].T).T), 2 * torch.ones(2, 3, dtype=F64))
    True
    """
    U, left = orthonormal_basis([part.scaling * part.B.to(F64) for part in parts])
    V, right = orthonormal_basis([part.A.to(F64).T for part in parts])
    return Cores(U, V, left, right)


def truncated(core: Tensor, cores: Cores, truncation: Truncation) -> Truncated:
    """Truncate a core to the best factors of a rank: B A ≈ U · core · Vᵀ, with √σ in both factors.

    The singular values give the error (Eckart and Young, 1936).
    """
    found = truncated_dense(core, truncation)
    A, B = found.factors.A, found.factors.B
    return replace(found, factors=Factors(cores.V.times(A.T).T, cores.U.times(B), 1.0))


def truncated_dense(delta: Tensor, truncation: Truncation) -> Truncated:
    """Truncate a dense ΔW (d_out × d_in); see :func:`truncated`."""
    left, singular, right = torch.linalg.svd(delta.to(F64), full_matrices=False)
    kept, directions = truncation.kept(singular), EVERYTHING.kept(singular)
    root, squares = singular[:kept].sqrt(), singular.square()
    factors = Factors(root[:, None] * right[:kept], left[:, :kept] * root, 1.0)
    return Truncated(factors, float(squares.sum()), float(squares[kept:directions].sum()))


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
    """Factors of Σ c_n ΔW_n, in a dtype or a wider one; see :func:`weighted_bias` for the biases.

    Without a truncation they are the experts' factors side by side, if a matrix of that shape can have rank Σ r_n. This
    needs no decomposition, and every number is rounded at most once
    (:func:`~pimerge.adapters.rounding.side_by_side`).
    """
    rank = sum(len(part.A) for part, c in zip(parts, coefficients, strict=True) if c)
    if truncation == EVERYTHING and rank <= min(len(parts[0].B), parts[0].A.shape[1]):
        placed = side_by_side(parts, coefficients, dtype)
        return Truncated(placed.factors, placed.energy, 0.0, placed.error)
    cores = to_cores(parts)
    return truncated(cores.summed(coefficients), cores, truncation)


def weighted_bias(
    parts: Sequence[Factors], coefficients: Sequence[float], dtype: torch.dtype, scaling: float = 1.0
) -> Tensor:
    """Σ c_n s_n bias_n / s, (d_out), for a result with scaling s; zero for an update without a bias."""
    total = torch.zeros(len(parts[0].B), dtype=F64)
    for part, c in zip(parts, coefficients, strict=True):
        if part.bias is not None:
            total += c * part.scaling * part.bias.to(F64)
    return (total / scaling).to(dtype)


def _principal(gram: Tensor) -> Tensor:
    """The eigenvectors of a Gram matrix, in descending order of their eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)
