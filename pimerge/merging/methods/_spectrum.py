"""Singular vectors of matrices of low rank, for the spectral methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION = 64
"""Number of columns of the random projection that finds the column space of a matrix of low rank."""
STORED = 1e-6
"""Singular values below this share of the norm are rounding errors, as experts are stored in float32 or coarser."""


def svd(matrix: Tensor, null: float | None = None, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ, Vᵀ without null directions, which are arbitrary: (m, n) → (m, k), (k), (k, n).

    Args:
        null: k is the number of σ above this share of the Frobenius norm; by default the rounding error of the dtype.
        of: matrix whose norm is used; by default ``matrix`` itself.

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
    """Return an orthonormal basis of the column space, (m, n) → (m, k), or None if the rank is not low.

    The rank of an expert's core is far below its size. A random projection finds a basis, and the residual of the
    matrix outside its span shows whether the basis is complete. The decomposition is then of a matrix that is twenty
    times smaller.
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
    """Return the nearest matrix with orthonormal columns: PQᵀ of PΣQᵀ, (m, k) → (m, k).

    Null directions of linearly dependent columns are left out.

    >>> import torch
    >>> whiten(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[0.7071, 0.7071],
            [0.0000, 0.0000]])
    """
    P, _, Qh = svd(vectors, null=STORED)
    return P @ Qh
