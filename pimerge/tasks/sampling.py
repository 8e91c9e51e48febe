"""Sample and split examples with a seed; indices are returned in the order of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    import torch

_FEWER = "ask for fewer --shots, or pass --up-to-shots to take all there are"
_SHOWN = 10


def sample_shots(
    labels: Sequence[int], shots: int, seed: int, names: Sequence[str], *, up_to: bool = False
) -> list[int]:
    """Sample ``shots`` examples per class; a class with fewer examples is an error, or gives all of them if ``up_to``.

    Args:
        labels: the class of each example.
        shots: examples per class.
        seed: seed of the random order, of which the first examples per class are taken.
        names: names of the classes; empty if all examples have the class 0.

    >>> sample_shots([0, 1, 0, 1, 0], 1, seed=0, names=["even", "odd"])
    [1, 4]
    """
    _require_shots(shots)
    order = permutation(len(labels), seed)
    groups: list[list[int]] = [[] for _ in names or [""]]
    for place in order:
        groups[labels[place]].append(place)
    if not names and len(order) < shots and not up_to:
        raise PimergeError(f"there are {len(order)} examples, {shots} were asked for", _FEWER)
    if names and not up_to:
        _require_each({name: len(group) for name, group in zip(names, groups, strict=True)}, shots, "examples")
    return sorted(place for group in groups for place in group[:shots])


def _require_each(counts: Mapping[str, int], shots: int, what: str) -> None:
    """Refuse to sample more than there is of a class; all such classes are one problem."""
    few = [f"'{name}' ({count})" for name, count in counts.items() if count < shots]
    if few:
        shown = ", ".join(few[:_SHOWN]) + (f" and {len(few) - _SHOWN} more" if len(few) > _SHOWN else "")
        raise PimergeError(
            f"{len(few)} of {len(counts)} classes have too few {what}, {shots} were asked for: {shown}",
            _FEWER,
        )


def sample_sentences(
    held: Sequence[set[int]], shots: int, seed: int, names: Sequence[str], *, up_to: bool = False
) -> list[int]:
    """Sample sentences until at least ``shots`` of them contain each class that occurs.

    In a random order, every sentence is taken that contains a class without enough sentences so far. A class that
    occurs in fewer sentences is an error, or all of them are taken if ``up_to``.

    Args:
        held: the classes in each sentence.
        shots: sentences per class.
        seed: seed of the order.
        names: names of the classes.

    >>> sample_sentences([{0}, {0, 1}, {0}, {1}], 1, seed=0, names=["O", "NAME"])
    [0, 1]
    """
    _require_shots(shots)
    occurring = {name: sum(index in classes for classes in held) for index, name in enumerate(names)}
    if not up_to:
        _require_each({name: count for name, count in occurring.items() if count}, shots, "sentences")
    counts: Counter[int] = Counter()
    chosen = []
    for index in permutation(len(held), seed):
        if any(counts[label] < shots for label in held[index]):
            chosen.append(index)
            counts.update(held[index])
    return sorted(chosen)


def _require_shots(shots: int) -> None:
    if shots < 1:
        raise PimergeError(f"--shots must be at least 1; got {shots}")


def split_holdout(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices for training and holding out: the same share of each class, but at least one to train on.

    >>> split_holdout([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
    ([1, 2, 3, 5, 6, 7], [0, 4])
    """
    held_out: set[int] = set()
    for members in _shuffled_classes(labels, seed):
        held_out.update(members[: min(round(share * len(members)), len(members) - 1)])
    return _split(labels, held_out)


def split_fold(labels: Sequence[int], fold: int, folds: int, seed: int) -> tuple[list[int], list[int]]:
    """Split indices for training and holding out one of the :func:`stratified_folds`, with ``level`` off.

    >>> split_fold([0, 0, 0, 1, 1, 1], 0, 3, seed=0)
    ([0, 1, 3, 4], [2, 5])
    """
    fold_of = stratified_folds(labels, folds, seed, level=False)
    return _split(labels, {index for index, own in enumerate(fold_of) if own == fold})


def stratified_folds(labels: Sequence[int], folds: int, seed: int, *, level: bool) -> list[int]:
    """Assign each example to the fold that holds it out, with each class spread evenly.

    Args:
        labels: the class of each example.
        folds: number of folds.
        seed: seed that shuffles the examples of each class.
        level: start each class at the fold where the previous class ended, so that folds have equal sizes; otherwise
            every class starts at the first fold.

    Returns:
        the fold of each example; −1 for the only example of a class.

    >>> stratified_folds([0, 0, 0, 1, 1, 1, 2], 2, seed=0, level=True)
    [1, 0, 0, 1, 0, 1, -1]
    """
    fold_of = [-1] * len(labels)
    dealt = 0
    for members in _shuffled_classes(labels, seed):
        if len(members) > 1:
            for place, index in enumerate(members, dealt):
                fold_of[index] = place % folds
            dealt += len(members) if level else 0
    return fold_of


def permutation(length: int, seed: int) -> list[int]:
    """Shuffle the numbers below ``length``.

    >>> permutation(3, seed=0)
    [2, 0, 1]
    """
    return _shuffled(range(length), _generator(seed))


def _shuffled_classes(labels: Sequence[int], seed: int) -> list[list[int]]:
    """Shuffle the indices of each class."""
    generator = _generator(seed)
    of_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        of_class[label].append(index)
    return [_shuffled(members, generator) for members in of_class.values()]


def _shuffled(values: Sequence[int], generator: torch.Generator) -> list[int]:
    import torch

    return [values[place] for place in torch.randperm(len(values), generator=generator).tolist()]


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _split(labels: Sequence[int], held_out: set[int]) -> tuple[list[int], list[int]]:
    return [index for index in range(len(labels)) if index not in held_out], sorted(held_out)
