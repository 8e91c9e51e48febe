"""Singular vectors of matrices whose rank is low."""

from __future__ import annotations

import pytest
import torch

from pimerge.merging.methods._spectrum import PROJECTION, svd
from tests.support.numerics import normal

F64 = torch.float64


@pytest.mark.parametrize("rank", [1, 16, PROJECTION - 1, PROJECTION + 1, 100])
def test_a_large_matrix_of_any_rank_has_the_singular_triples_of_the_dense_one(rank: int) -> None:
    decay = torch.logspace(0, -5, rank, dtype=F64)
    matrix = (normal(300, rank, seed=1).to(F64) * decay) @ normal(rank, 280, seed=2).to(F64)
    U, S, Vh = svd(matrix)
    assert len(S) == rank
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[:rank], rtol=1e-9, atol=0)
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=0, atol=1e-12 * float(matrix.norm()))
    torch.testing.assert_close(U.mT @ U, torch.eye(rank, dtype=F64), rtol=0, atol=1e-12)


def test_a_large_zero_has_no_triples() -> None:
    assert [part.shape for part in svd(torch.zeros(300, 280))] == [(300, 0), (0,), (0, 280)]
