"""Decompositions of large matrices by random vectors, against the full one."""

from __future__ import annotations

import pytest
import torch

from pimerge.adapters.low_rank import Truncation
from pimerge.merging.extraction import decompose as module
from pimerge.merging.extraction.decompose import decompose
from tests.support.numerics import normal

F64 = torch.float64


def spectrum(decay: float, rows: int = 120, columns: int = 90) -> torch.Tensor:
    """A matrix whose singular values fall by a power."""
    U = torch.linalg.qr(normal(rows, columns, seed=1).double())[0]
    V = torch.linalg.qr(normal(columns, columns, seed=2).double())[0]
    return U * torch.arange(1, columns + 1, dtype=F64) ** -decay @ V.T


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("truncation", [Truncation(4), Truncation(None, 0.3), Truncation(6, 0.9)])
def test_the_random_decomposition_is_nearly_the_best(
    decay: float, truncation: Truncation, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = spectrum(decay)
    best = decompose(delta, truncation, F64, 0)
    monkeypatch.setattr(module, "_DENSE", 8)
    monkeypatch.setattr(module, "_FIRST_RANK", 2)
    found = decompose(delta, truncation, F64, 0)
    assert found.energy == best.energy
    assert len(found.factors.A) in (len(best.factors.A), len(best.factors.A) + 1)
    true = float((delta - found.factors.B @ found.factors.A).square().sum())
    assert found.lost == pytest.approx(true, rel=1e-9)
    if len(found.factors.A) == len(best.factors.A):
        assert (found.lost / found.energy) ** 0.5 == pytest.approx((best.lost / best.energy) ** 0.5, rel=1e-3)


def test_directions_below_the_rounding_are_dropped_only_if_they_are_rounding() -> None:
    exact = normal(60, 3, seed=1).double() @ normal(3, 40, seed=2).double()
    noisy = exact + 1e-4 * normal(60, 40, seed=3).double()
    assert len(decompose(noisy, Truncation(), F64, 0, noise=1e-4).factors.A) == 3
    assert len(decompose(noisy, Truncation(), F64, 0, noise=1e-6).factors.A) == 40
    assert len(decompose(noisy, Truncation(), F64, 0).factors.A) == 40


def test_the_rank_of_a_large_update_is_found_without_a_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DENSE", 8)
    monkeypatch.setattr(module, "_FIRST_RANK", 2)
    exact = normal(90, 5, seed=1).double() @ normal(5, 80, seed=2).double()
    noisy = exact + 1e-5 * normal(90, 80, seed=3).double()
    found = decompose(noisy, Truncation(), F64, 0, noise=1e-5)
    assert len(found.factors.A) == 5
    assert found.lost == pytest.approx(1e-10 * 90 * 80, rel=0.2)
