"""The loss of all tune methods: the mean cross-entropy over all targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pimerge.tasks.examples import IGNORED, Examples, bucket_by_length, on_device

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_AT_ONCE = 4096


def mean_loss(output: Any, labels: Tensor, num_items_in_batch: Any = None, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean over all targets of −Σ_c q_c log p_c, with q = (1 − ε)·[c is the target] + ε/C (arXiv 1512.00567).

    The models' own losses are unsuitable: some shift the labels, which are already aligned, and none smooths them.

    Args:
        output: output of the model, with logits (…, C).
        labels: (…), −100 for positions without a target; or distributions q (…, C), 0 for positions without a target.
        num_items_in_batch: passed by the Trainer and not used.
        label_smoothing: ε.

    >>> from types import SimpleNamespace
    >>> output = SimpleNamespace(logits=torch.tensor([[[0.0, 0.0], [9.0, 0.0]]]))
    >>> round(float(mean_loss(output, torch.tensor([[1, -100]]))), 4)
    0.6931
    """
    if labels.is_floating_point():
        kept = labels.sum(-1) > 0
        return cross_entropy(output.logits[kept].to(labels.dtype), labels[kept])
    kept = labels != IGNORED
    # earlier positions belong to a prompt's vectors
    logits = (output.logits[:, -labels.shape[1] :] if labels.dim() > 1 else output.logits)[kept]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, labels[kept], label_smoothing=label_smoothing)


def held_out_loss(model: nn.Module, examples: Examples, device: torch.device) -> float:
    """The mean of −log p over all targets, in nats, in eval mode."""
    model.eval()
    total, count = 0.0, 0
    for indices in bucket_by_length(examples.lengths, _TOKENS_AT_ONCE):
        batch = on_device(examples.batch(indices), device)
        labels = batch.pop("labels")
        targets = int((labels != IGNORED).sum())
        with torch.no_grad():
            output = model(**batch)
        total += targets * float(mean_loss(output, labels))
        count += targets
    return total / count
