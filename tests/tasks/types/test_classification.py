"""Log-likelihoods, draws and scores of the classification types against the formulas, one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pimerge.tasks.examples import Examples, bucket_by_length
from pimerge.tasks.task_type import TASK_TYPES

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0], [-2.0, 1.0, 1.5], [40.0, -40.0, 0.0]])
TYPES = ["image-classification", "text-classification"]


class Fixed(nn.Module):
    """Answers with the logits that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Any:
        return SimpleNamespace(logits=logits)


def batch_of(labels: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"logits": LOGITS.to(dtype), "labels": torch.tensor(labels)}


def examples_of(logits: Tensor, labels: Sequence[int]) -> Examples:
    def get(index: int) -> dict[str, Tensor]:
        return {"logits": logits[index], "labels": torch.tensor(labels[index])}

    return Examples(
        [1] * len(labels), get, lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    )


@pytest.mark.parametrize("name", TYPES)
def test_nll_is_minus_the_log_of_the_softmax(name: str) -> None:
    labels = [0, 2, 1, 1]
    found = TASK_TYPES.load(name).nll(Fixed(), batch_of(labels, torch.float64))
    expected = [
        -(row.double().exp() / row.double().exp().sum())[y].log() for row, y in zip(LOGITS, labels, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", TYPES)
def test_the_score_is_the_nll_and_whether_the_largest_logit_is_the_label(name: str) -> None:
    kind = TASK_TYPES.load(name)
    found = kind.score(Fixed(), examples_of(LOGITS, [0, 1, 2, 0]), [3, 1, 2, 0])
    assert found.right == [True, False, True, True]
    assert found.chosen == [0, 2, 2, 0]
    torch.testing.assert_close(found.losses, kind.nll(Fixed(), batch_of([0, 1, 2, 0]))[[3, 1, 2, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_likelihood_is_in_float32_or_wider(dtype: torch.dtype) -> None:
    found = TASK_TYPES.load("text-classification").nll(Fixed(), batch_of([0, 0, 0, 0], dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_labels_are_drawn_as_often_as_the_model_believes_in_them() -> None:
    draw = TASK_TYPES.load("image-classification").draw
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for row in LOGITS:
        drawn = draw(Fixed(), examples_of(row.expand(1000, 3), [0] * 1000), range(1000), uniform)
        shares = torch.bincount(torch.tensor(drawn), minlength=3) / 1000
        torch.testing.assert_close(shares, row.softmax(0), atol=2e-3, rtol=0)


def test_a_draw_by_the_largest_uniform_number_is_still_a_class() -> None:
    draw = TASK_TYPES.load("text-classification").draw
    uniform = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    assert max(draw(Fixed(), examples_of(LOGITS, [0] * 4), range(4), uniform)) <= 2


@pytest.mark.parametrize("max_tokens", [1, 7, 20, 10_000])
def test_buckets_hold_every_example_once_within_the_bound(max_tokens: int) -> None:
    lengths = torch.randint(1, 12, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucket_by_length(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)
