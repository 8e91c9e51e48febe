"""Drop, rescale, elect and average."""

from __future__ import annotations

import pytest

from pimerge.merging.methods import dare_ties
from tests.support.merge_cases import close, kept_masks, low_rank, seeded, weights_of
from tests.support.merge_references import REFERENCES


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_it_is_the_reference(density: float) -> None:
    deltas, weights = low_rank().deltas, weights_of(3)
    masks = kept_masks(deltas, density)
    found = dare_ties.merge(deltas, weights, generators=seeded(3), density=density, scale=0.5)
    close(found, REFERENCES["dare-ties"](deltas, weights, masks=masks, density=density, scale=0.5))
