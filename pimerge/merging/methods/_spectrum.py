"""Singular vectors of matrices whose rank is low, shared by the spectral methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION = 64
"""Columns of the random projection that finds the span of a matrix of low rank."""
STORED = 1e-6
"""Experts are stored in float32 or coarser: what is below this share of the whole is rounding, not a direction."""


def svd(matrix: Tensor, null: float | None = None, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ without the null directions, which would be arbitrary: (m, n) → (m, k), (k), (k, n).

    Args:
        null: k counts the σ above this share of the Frobenius norm; by default the rounding of the dtype.
        of: the matrix whose norm counts; by default ``matrix`` itself.

    >>> import torch
    >>> [part.shape for part in svd(torch.ones(3, 2))]
    [torch.Size([3, 1]), torch.Size([1]), torch.Size([1, 2])]
    """
    import torch

    if null is None:
        null = 8 * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    Q = _column_space(matrix)
    U, S, Vh = torch.linalg.svd(matrix if Q is None else Q.mT @ matrix, full_matrices=False)
    U = U if Q is None else Q @ U
    floor = null * torch.linalg.vector_norm(matrix if of is None else of)
    k = int(S.gt(floor).sum())
    return U[:, :k], S[:k], Vh[:k]


def _column_space(matrix: Tensor) -> Tensor | None:
    """Orthonormal columns that span a matrix of low rank, (m, n) → (m, k); None if its rank is not low.

    An expert's core has a rank far below its size. A random projection finds the span, and what is left of the
    matrix outside of it tells whether that was all: then the singular values are those of a matrix twenty times
    smaller.
    """
    import torch

    if min(matrix.shape) <= 4 * PROJECTION:
        return None
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(matrix.shape[1], PROJECTION, generator=generator, dtype=torch.float64).to(matrix)
    Q = torch.linalg.qr(matrix @ projection).Q
    outside = torch.linalg.vector_norm(matrix - Q @ (Q.mT @ matrix))
    rounding = 8 * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return Q if outside <= rounding * torch.linalg.vector_norm(matrix) else None


def whiten(vectors: Tensor) -> Tensor:
    """The orthonormal columns nearest to the given ones: PQᵀ of PΣQᵀ, (m, k) → (m, k).

    Columns that depend on each other share what their span holds: null directions are left out.

    >>> import torch
    >>> whiten(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[0.7071, 0.7071],
            [0.0000, 0.0000]])
    """
    P, _, Qh = svd(vectors, null=STORED)
    return P @ Qh
