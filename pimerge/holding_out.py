"""Which of the few labelled examples are held out: a share of each class, or one of several folds."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def split_holdout(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, the same share of each class, at least one to train on.

    >>> split_holdout([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
    ([1, 2, 3, 5, 6, 7], [0, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, value in enumerate(labels) if value == label]
        order = torch.randperm(len(members), generator=generator).tolist()
        count = min(round(share * len(members)), len(members) - 1)
        held_out += [members[i] for i in order[:count]]
    kept = set(held_out)
    return [index for index in range(len(labels)) if index not in kept], sorted(held_out)


def split_fold(labels: Sequence[int], fold: int, folds: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out: one of several folds, with as many of each class as can be.

    >>> split_fold([0, 0, 0, 1, 1, 1], 0, 3, seed=0)
    ([0, 1, 3, 4], [2, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, value in enumerate(labels) if value == label]
        order = torch.randperm(len(members), generator=generator).tolist()
        if len(members) > 1:  # the only example of a class is always trained on
            held_out += [members[i] for place, i in enumerate(order) if place % folds == fold]
    kept = set(held_out)
    return [index for index in range(len(labels)) if index not in kept], sorted(held_out)
