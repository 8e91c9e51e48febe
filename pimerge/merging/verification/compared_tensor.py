"""One tensor of a merge beside the updates that it should be the sum of.

Every update is an array (rows × columns) in the orientation in which the base stores the weight; a convolution's kernel
is flattened into the columns. It is low-rank, or the difference of two stored tensors; it is read in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pimerge.adapters.lora_module import Factors
from pimerge.checkpoints.dtypes import torch_dtype
from pimerge.checkpoints.safetensors_file import PIECE, TensorFile
from pimerge.merging.verification.rounding import precision_of

F64 = torch.float64


@dataclass(frozen=True)
class LowRank:
    """Δ = left · right, (rows × r) and (r × columns) in float64.

    Attributes:
        dtype: the narrowest dtype that holds the stored factors.
        is_recomputed: whether a program computes the whole weight anew when it merges this update, as for DoRA.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype
    is_recomputed: bool = False

    @property
    def factors(self) -> Factors:
        """The same update in the layout of a LoRA."""
        return Factors(self.right, self.left, 1.0)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a full checkpoint, or one matrix of a stacked tensor; its update is the difference to the base's.

    Attributes:
        first: the row at which the matrix starts.
    """

    file: TensorFile
    key: str
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return torch_dtype(self.file.entries[self.key].dtype)

    def rows(self, start: int, stop: int, columns: int) -> Tensor:
        """Read some rows in the stored dtype, (stop − start, columns)."""
        start, stop = self.first + start, self.first + stop
        return self.file.read_part(self.key, start * columns, stop * columns).view(-1, columns)


@dataclass(frozen=True)
class HeldTensor:
    """Values of a tensor that are in memory; the update is the difference to the base's."""

    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def rows(self, start: int, stop: int, columns: int) -> Tensor:
        """Some rows, (stop − start, columns)."""
        return self.values.reshape(-1, columns)[start:stop]


Dense = StoredTensor | HeldTensor
Part = LowRank | Dense


@dataclass(frozen=True)
class ComparedTensor:
    """What a merge holds for one tensor, and the updates that were to be added up there.

    Attributes:
        name: module, or the key of a tensor that belongs to none.
        found: the tensor or the update in the merge; None if the merge has no update there.
        parts: the update of each expert; None for an expert that does not change the tensor.
        base: the base's tensor; None if only adapters are compared.
        shape: rows and columns.
    """

    name: str
    found: Part | None
    parts: Sequence[Part | None]
    base: Dense | None
    shape: tuple[int, int]

    @property
    def is_low_rank(self) -> bool:
        """Whether every update is low-rank, so that no dense array is needed."""
        return not any(isinstance(part, Dense) for part in (self.found, *self.parts))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block; about PIECE bytes in float64."""
        rows, columns = self.shape
        step = max(1, PIECE // (8 * max(1, columns)))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def delta(self, part: Part | None, start: int, stop: int) -> Tensor:
        """Some rows of an update in float64."""
        columns = self.shape[1]
        if part is None:
            return torch.zeros(stop - start, columns, dtype=F64)
        if isinstance(part, LowRank):
            return part.left[start:stop] @ part.right
        assert self.base is not None
        return part.rows(start, stop, columns).to(F64) - self.base.rows(start, stop, columns).to(F64)

    def project(self, X: Tensor, Y: Tensor) -> Tensor:
        """Xᵀ F Y of what was found, for X (rows × a) and Y (columns × b), in one pass over F."""
        if isinstance(self.found, LowRank):
            return (X.T @ self.found.left) @ (self.found.right @ Y)
        total = torch.zeros(X.shape[1], Y.shape[1], dtype=F64)
        for start, stop in self.blocks():
            total += X[start:stop].T @ (self.delta(self.found, start, stop) @ Y)
        return total

    def distance_in_span(self, weights: Sequence[float]) -> float:
        """How far a low-rank F is from the claim C = Σ w_n Δ_n in its own rows or columns.

        It is zero if F is a projection of C, such as its best approximation of a rank.

        Returns:
            min(‖Uᵀ(F − C)‖, ‖(F − C)V‖) for orthonormal bases U and V of F's columns and rows.
        """
        assert isinstance(self.found, LowRank)
        U, V = (torch.linalg.qr(factor)[0] for factor in (self.found.left, self.found.right.T))
        left, right = torch.zeros(U.shape[1], self.shape[1], dtype=F64), 0.0
        for start, stop in self.blocks():
            error = self.delta(self.found, start, stop)
            for part, w in zip(self.parts, weights, strict=True):
                error = error - w * self.delta(part, start, stop)
            left += U[start:stop].T @ error
            right += float((error @ V).square().sum())
        return min(float(left.norm()), math.sqrt(right))


def low_rank(factors: Factors, *, transposed: bool, is_recomputed: bool = False) -> LowRank:
    """An adapter's update in the orientation in which the base stores the weight.

    Args:
        transposed: whether the base stores (d_in × d_out).
        is_recomputed: as for :class:`LowRank`.
    """
    A, B = factors.A.cpu(), factors.B.cpu()
    dtype = min((precision_of(tensor) for tensor in (A, B)), key=lambda kind: torch.finfo(kind).eps)
    left, right = factors.scaling * B.to(F64), A.to(F64)
    return LowRank(*((right.T, left.T) if transposed else (left, right)), dtype, is_recomputed)
