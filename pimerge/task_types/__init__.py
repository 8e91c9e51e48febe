"""Types of task: how rows become batches, and batches a log-likelihood, one file per type.

A type has

- ``AUTO_MODEL``: the transformers class that loads a base for it, and ``PEFT_TASK``: PEFT's name for it;
- ``COLUMNS``: role → whether ``task.json``'s data must have it;
- ``load_processor(source, revision)``: tokenizer or image processor of the base;
- ``encode(rows, columns, labels, processor, config)`` → :class:`Examples`;
- ``nll(model, batch)``: −log p(y|x) of each example, summed over its target tokens, shape (batch);
- ``draw(model, batch, uniform)``: the batch with its targets drawn from the model's own distribution;
- ``score(model, batch)``: −log p(y|x) and whether the answer is right, each of shape (batch).

Files that begin with an underscore hold what several types share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class Examples:
    """Encoded examples of one split, in order; a map-style data set for PyTorch.

    Attributes:
        lengths: tokens (or patches) of each example, for batches of bounded size.
        get: example i as tensors without a batch axis, ``labels`` among them.
        collate: several examples → one padded batch.
        truncated: how many were longer than the model takes and lost their end.
    """

    lengths: Sequence[int]
    get: Callable[[int], Batch]
    collate: Callable[[Sequence[Batch]], Batch]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        return self.get(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The padded batch of these examples."""
        return self.collate([self.get(index) for index in indices])


def bucket_by_length(lengths: Sequence[int], max_tokens: int, *, padded: bool = True) -> list[list[int]]:
    """Batches of examples of similar length, each of at most ``max_tokens`` with its padding.

    An example longer than that is a batch of its own.

    Args:
        padded: off, the examples of a batch have one length.

    >>> bucket_by_length([5, 2, 2, 9], max_tokens=10)
    [[1, 2], [0], [3]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        alike = padded or (batches and lengths[batches[-1][0]] == lengths[index])
        if batches and alike and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
