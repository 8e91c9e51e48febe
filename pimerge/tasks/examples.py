"""Rows of a split, encoded examples, and a model's scored answers."""

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
        labels: class index of each row.
        numbers: position of each row in its split, for messages.
        where: description of the split, for messages.
        words: class indices of each row's words, if words have classes.
        skipped: number of rows of the split that were left out, because they have no label.
    """

    table: Any
    columns: Mapping[str, str]
    labels: Sequence[int]
    numbers: Sequence[int]
    where: str
    words: Sequence[Sequence[int]] = ()
    skipped: int = 0

    def select(self, positions: Sequence[int]) -> Rows:
        """Select rows by position."""
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
            self.skipped,
        )


@dataclass(frozen=True)
class Scored:
    """A model's answers to n examples, and whether they are right.

    Attributes:
        losses: −log p(y|x) of each example, (n).
        right: whether each answer is right.
        chosen: class of each answer, or classes of its words; None if the answer is not a class.
        texts: text of each answer; empty for a type that only answers in classes.
        cut: whether each generated answer reached the maximum length without an end; empty if none is generated.
    """

    losses: Tensor
    right: Sequence[bool]
    chosen: Sequence[int | Sequence[int] | None]
    texts: Sequence[str] = ()
    cut: Sequence[bool] = ()


@dataclass(frozen=True)
class Examples:
    """Encoded examples of one split, in order: a map-style PyTorch dataset.

    Attributes:
        lengths: tokens (or patches) of each example, for batches of bounded size.
        get: index → tensors without a batch axis, including ``labels``.
        collate: several examples → one padded batch.
        truncated: number of examples that exceeded the model's maximum length and were cut.
        references: right answers to each example as texts; empty for a type that only answers in classes.
        alike: whether examples differ only in their number of tokens; false for images of several sizes that the model
            does not resize.
        classes: classes of each example's words, if words have classes; without words that were cut.
        skipped: number of rows of the split that were left out, because they have no label.
    """

    lengths: Sequence[int]
    get: Callable[[int], Batch]
    collate: Callable[[Sequence[Batch]], Batch]
    truncated: int = 0
    references: Sequence[Sequence[str]] = ()
    alike: bool = True
    classes: Sequence[Sequence[int]] = ()
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        return self.get(index)

    def remarks(self) -> list[str]:
        """What is to be said about the examples: those that were cut, and rows that were left out."""
        found = []
        if self.truncated:
            found.append(f"{self.truncated} examples exceed the model's maximum length and were cut")
        if self.skipped:
            found.append(f"{self.skipped} rows have no label and were left out")
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate the examples at some indices into a padded batch."""
        return self.collate([self.get(index) for index in indices])

    def subset(self, indices: Sequence[int]) -> Examples:
        """Select examples by index, for training."""
        return Examples([self.lengths[i] for i in indices], lambda i: self.get(indices[i]), self.collate)

    def joined(self, more: Examples) -> Examples:
        """Append other examples, for training."""
        here = len(self)
        return Examples(
            [*self.lengths, *more.lengths],
            lambda index: self.get(index) if index < here else more.get(index - here),
            self.collate,
        )

    def labelled(self, index: int, label: Any) -> Batch:
        """Example i with another class, or with other classes of its words."""
        example = self.get(index)
        return {**example, "labels": example["labels"].new_tensor(label)}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device."""
    return {name: value.to(device) for name, value in batch.items()}


def bucket_by_length(lengths: Sequence[int], max_tokens: int, *, padded: bool = True) -> list[list[int]]:
    """Group examples of similar length into batches of at most ``max_tokens`` tokens, including padding.

    A longer example forms its own batch.

    Args:
        padded: if false, all examples of a batch have the same length.

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
