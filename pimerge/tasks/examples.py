"""Rows of a split, encoded examples, and what a model answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch: TypeAlias = "dict[str, Tensor]"

IGNORED = -100
"""The label of a token that is not a target."""


@dataclass(frozen=True)
class Rows:
    """Rows of one split, before they are encoded.

    Attributes:
        table: a ``datasets.Dataset``.
        columns: role → column.
        labels: the class index of each row.
        numbers: the position of each row in its split, for messages.
        where: the split, in words.
        words: the class indices of each row's words, where words have classes.
    """

    table: Any
    columns: Mapping[str, str]
    labels: Sequence[int]
    numbers: Sequence[int]
    where: str
    words: Sequence[Sequence[int]] = ()

    def select(self, positions: Sequence[int]) -> Rows:
        """The rows at some positions."""
        if list(positions) == list(range(len(self.labels))):
            return self
        words = [self.words[position] for position in positions] if self.words else ()
        return Rows(
            self.table.select(positions),
            self.columns,
            [self.labels[position] for position in positions],
            [self.numbers[position] for position in positions],
            self.where,
            words,
        )


@dataclass(frozen=True)
class Scored:
    """A model's answers to some examples, and whether they are right.

    Attributes:
        losses: −log p(y|x) of each, (n).
        right: whether its answer is right, of each.
        chosen: the class that it answers, of each, or the classes of its words; None where the answer is not a class.
        texts: what it answers in words, of each; empty for a type that answers in classes only.
        cut: whether it was generated up to the most tokens, without an end, of each; empty where none is generated.
    """

    losses: Tensor
    right: Sequence[bool]
    chosen: Sequence[int | Sequence[int] | None]
    texts: Sequence[str] = ()
    cut: Sequence[bool] = ()


@dataclass(frozen=True)
class Examples:
    """Encoded examples of one split, in order; a map-style data set for PyTorch.

    Attributes:
        lengths: tokens (or patches) of each example, for batches of bounded size.
        get: example i as tensors without a batch axis, ``labels`` among them.
        collate: several examples → one padded batch.
        truncated: the number of examples that were longer than the model takes and were cut.
        references: the texts that are right for each; none for a type that answers in classes only.
        alike: whether all examples fill a batch equally except for padded tokens; false for images of several sizes
            where the model does not resize them.
        classes: of each example's words, where words have classes; without words that were cut.
    """

    lengths: Sequence[int]
    get: Callable[[int], Batch]
    collate: Callable[[Sequence[Batch]], Batch]
    truncated: int = 0
    references: Sequence[Sequence[str]] = ()
    alike: bool = True
    classes: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        return self.get(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The padded batch of these examples."""
        return self.collate([self.get(index) for index in indices])

    def subset(self, indices: Sequence[int]) -> Examples:
        """These examples alone, for training."""
        return Examples([self.lengths[i] for i in indices], lambda i: self.get(indices[i]), self.collate)

    def joined(self, more: Examples) -> Examples:
        """These examples and then others, for training."""
        here = len(self)
        return Examples(
            [*self.lengths, *more.lengths],
            lambda index: self.get(index) if index < here else more.get(index - here),
            self.collate,
        )

    def labelled(self, index: int, label: Any) -> Batch:
        """Example i as :attr:`get` has it, but of another class, or of other classes of its words."""
        example = self.get(index)
        return {**example, "labels": example["labels"].new_tensor(label)}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


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
