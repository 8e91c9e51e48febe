"""What the classification types share: p(y|x) is the softmax of the logits, and y a class index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pimerge.task_types import Batch


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (batch × classes), in float32 or wider."""
    output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output if output.dtype == torch.float64 else output.float()


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(y|x) of each example, shape (batch)."""
    return cross_entropy(logits(model, batch), batch["labels"], reduction="none")


def draw(model: nn.Module, batch: Batch, uniform: Tensor) -> Batch:
    """The batch with y drawn from p(·|x) by inverting its distribution function at ``uniform`` (batch)."""
    with torch.no_grad():
        distribution = logits(model, batch).double().softmax(1).cumsum(1)
    drawn = torch.searchsorted(distribution, uniform.to(distribution)[:, None])[:, 0]
    return {**batch, "labels": drawn.clamp(max=distribution.shape[1] - 1)}


def score(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """−log p(y|x) and whether the most likely class is y, each of shape (batch)."""
    with torch.no_grad():
        output = logits(model, batch)
    return cross_entropy(output, batch["labels"], reduction="none"), output.argmax(1) == batch["labels"]
