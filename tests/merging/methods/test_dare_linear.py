"""Drop, rescale and add."""

from __future__ import annotations

import pytest
import torch

from pimerge.merging.methods import dare_linear
from tests.support.merge_cases import close, kept_masks, low_rank, seeded, weights_of
from tests.support.merge_references import REFERENCES


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_it_is_the_reference(density: float) -> None:
    deltas, weights = low_rank().deltas, weights_of(3)
    masks = kept_masks(deltas, density)
    found = dare_linear.merge(deltas, weights, generators=seeded(3), density=density, scale=0.5)
    close(found, REFERENCES["dare-linear"](deltas, weights, masks=masks, density=density, scale=0.5))


@pytest.mark.parametrize("density", [0.0001, 0.1, 0.9, 0.99999])
def test_the_expectation_is_the_update(density: float) -> None:
    found = dare_linear.merge(torch.ones(1, 1000, 1000), torch.ones(1), generators=seeded(1), density=density)
    error = ((1 - density) / density / 1e6) ** 0.5
    assert float(found.double().mean()) == pytest.approx(1.0, abs=4 * error + 1e-7)


def test_the_draws_of_an_expert_do_not_depend_on_the_others() -> None:
    deltas = low_rank().deltas
    alone = dare_linear.merge(deltas[1:2], torch.ones(1), generators=seeded(2)[1:])
    among = dare_linear.merge(deltas, torch.tensor([0.0, 1.0, 0.0]), generators=seeded(3))
    assert torch.equal(alone, among)


def test_the_dtype_does_not_change_the_draws() -> None:
    single = dare_linear.merge(torch.ones(1, 50), torch.ones(1), generators=seeded(1))
    assert torch.equal(
        single, dare_linear.merge(torch.ones(1, 50).double(), torch.ones(1), generators=seeded(1)).float()
    )
