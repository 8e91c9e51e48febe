"""Methods on the cores in the reference bases."""

from __future__ import annotations

import pytest
import torch

from pimerge.merging.methods import core_space
from tests.support.merge_cases import close, low_rank, weights_of
from tests.support.merge_references import REFERENCES, reference_bases


@pytest.mark.parametrize("inner_method", ["ties", "linear", "tsv", "iso-c"])
def test_it_is_the_reference_on_the_dense_updates(inner_method: str) -> None:
    case, weights = low_rank(), weights_of(3)
    U, V = map(torch.as_tensor, reference_bases(case.factors))
    merged = core_space.merge(U.mT @ case.deltas @ V, weights, limit=9, inner_method=inner_method, scale=0.5)
    options = {"factors": case.factors, "inner_method": inner_method, "scale": 0.5}
    close(U @ merged @ V.mT, REFERENCES["core-space"](case.deltas, weights, **options))
