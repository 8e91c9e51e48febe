"""Decorrelated singular triples."""

from __future__ import annotations

import torch
from hypothesis import given

from pimerge.merging.methods import tsv
from tests.support.merge_cases import F64, Case, cases, close, low_rank, weights_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import small


def test_experts_with_orthogonal_directions_are_added() -> None:
    deltas = torch.zeros(2, 4, 3, dtype=F64)
    deltas[0, 0, 0], deltas[1, 2, 1] = 5.0, -2.0
    close(tsv.merge(deltas, torch.tensor([1.0, 0.5], dtype=F64), limit=3), deltas[0] + 0.5 * deltas[1])


def test_each_expert_keeps_its_share_of_the_limit() -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=F64))
    found = tsv.merge(torch.stack([delta, torch.zeros_like(delta)]), torch.ones(2, dtype=F64), limit=3)
    close(found, torch.diag(torch.tensor([3.0, 0.0, 0.0], dtype=F64)))


def test_copies_at_weight_one_give_the_expert() -> None:
    delta = low_rank([2]).deltas[0]
    close(tsv.merge(delta.expand(3, -1, -1), torch.ones(3, dtype=F64), limit=9), delta)


@small
@given(cases())
def test_it_is_the_reference_on_the_dense_updates(case: Case) -> None:
    weights = weights_of(len(case.deltas))
    found = case.U @ tsv.merge(case.cores, weights, limit=case.limit, scale=0.5) @ case.V.mT
    close(found, REFERENCES["tsv"](case.deltas, weights, scale=0.5), relative=1e-6)
