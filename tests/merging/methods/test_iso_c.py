"""The flat spectrum."""

from __future__ import annotations

import torch
from hypothesis import given

from pimerge.merging.methods import iso_c
from tests.support.merge_cases import F64, Case, cases, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_all_singular_values_are_the_mean_of_those_of_the_sum() -> None:
    deltas = low_rank([2, 1]).deltas
    before = torch.linalg.svdvals(deltas.sum(0))
    after = torch.linalg.svdvals(iso_c.merge(deltas, torch.ones(2, dtype=F64), scale=2.0))
    close(after[:3], 2 * before[:3].mean().expand(3))
    assert float(after[3:].max()) < 1e-13


@small
@given(cases())
def test_it_is_the_reference_on_the_dense_updates(case: Case) -> None:
    weights = weights_of(len(case.deltas))
    found = case.U @ iso_c.merge(case.cores, weights) @ case.V.mT
    close(found, REFERENCES["iso-c"](case.deltas, weights), relative=1e-6)
