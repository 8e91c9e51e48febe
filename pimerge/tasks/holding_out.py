"""Which of the few labelled examples are held out: a share of each class, or one of several folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def split_holdout(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, the same share of each class, at least one to train on.

    >>> split_holdout([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
    ([1, 2, 3, 5, 6, 7], [0, 4])
    """
    counts = ((members, min(round(share * len(members)), len(members) - 1)) for members in _classes(labels, seed))
    return _apart(labels, {index for members, count in counts for index in members[:count]})


def split_fold(labels: Sequence[int], fold: int, folds: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out: one of several folds, with as many of each class as can be.

    The only example of a class is always trained on.

    >>> split_fold([0, 0, 0, 1, 1, 1], 0, 3, seed=0)
    ([0, 1, 3, 4], [2, 5])
    """
    repeated = (members for members in _classes(labels, seed) if len(members) > 1)
    return _apart(labels, {index for members in repeated for index in members[fold::folds]})


def _classes(labels: Sequence[int], seed: int) -> Iterator[list[int]]:
    """The indices of each class, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(labels)):
        members = [index for index, value in enumerate(labels) if value == label]
        yield [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]


def _apart(labels: Sequence[int], held_out: set[int]) -> tuple[list[int], list[int]]:
    return [index for index in range(len(labels)) if index not in held_out], sorted(held_out)
