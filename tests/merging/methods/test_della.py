"""Drop by rank, elect and average."""

from __future__ import annotations

import pytest
import torch

from pimerge.merging.methods import della
from tests.support.merge_cases import close, low_rank, seeded, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal


@pytest.mark.parametrize("options", [{}, {"density": 0.3, "epsilon": 0.25}, {"density": 1.0}, {"epsilon": 0.0}])
def test_it_is_the_reference(options: dict[str, float]) -> None:
    deltas, weights = low_rank().deltas, weights_of(3)
    one = torch.ones(1, dtype=deltas.dtype)
    kept = [della.merge(d[None], one, generators=[g], **options) for d, g in zip(deltas, seeded(3), strict=True)]
    masks = torch.stack(kept) != 0
    found = della.merge(deltas, weights, generators=seeded(3), **options)
    # the probabilities really used are multiples of 1/65536
    close(found, REFERENCES["della"](deltas, weights, masks=masks, **options), relative=1e-4)


def test_the_larger_an_entry_the_likelier_it_stays() -> None:
    row = torch.tensor([0.1, -5.0, 2.0])
    found = della.merge(row.expand(1, 100_000, 3), torch.ones(1), generators=seeded(1), density=0.5, epsilon=0.4)
    shares = (found != 0).double().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.9, 0.5]).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(found.double().mean(0), row.double(), rtol=0.05, atol=0)


def test_one_dimension_is_one_row() -> None:
    vector = normal(1, 9)
    found = della.merge(vector, torch.ones(1), generators=seeded(1))
    assert torch.equal(found, della.merge(vector[:, None], torch.ones(1), generators=seeded(1))[0])
