"""Common and own directions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pimerge.merging.methods import iso_c, iso_cts
from tests.support.merge_cases import F64, Case, cases, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_all_common_is_iso_c() -> None:
    case, weights = low_rank(), weights_of(3)
    close(iso_cts.merge(case.deltas, weights, common=1.0), iso_c.merge(case.deltas, weights))


def test_an_expert_that_the_sum_hides_has_a_direction_of_its_own() -> None:
    deltas = torch.zeros(2, 3, 3, dtype=F64)
    deltas[0] = torch.diag(torch.tensor([8.0, 7.0, 0.0]))
    deltas[1, 2, 2] = 0.1
    found = iso_cts.merge(deltas, torch.ones(2, dtype=F64), common=0.4)  # one common, one of each
    close(found, (8.0 + 7.0 + 0.1) / 3 * torch.eye(3, dtype=F64))


@small
@given(cases(), st.sampled_from([0.3, 0.8]))
def test_it_is_the_reference_on_the_dense_updates(case: Case, common: float) -> None:
    weights = weights_of(len(case.deltas))
    found = case.U @ iso_cts.merge(case.cores, weights, common=common) @ case.V.mT
    close(found, REFERENCES["iso-cts"](case.deltas, weights, common=common), relative=1e-6)
