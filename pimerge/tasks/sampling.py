"""Which examples are drawn, by a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pimerge.core.errors import PimergeError, Problems


def sample_shots(labels: Sequence[int], shots: int, seed: int, names: Sequence[str]) -> list[int]:
    """Draw ``shots`` examples of each class, by a seed; the indices come back in the order of the data.

    Args:
        labels: the class of each example.
        names: of the classes; none if all examples are one group, of the class 0.

    Raises:
        PimergeError: naming each class with fewer examples.

    >>> sample_shots([0, 1, 0, 1, 0], 1, seed=0, names=["even", "odd"])
    [1, 4]
    """
    problems = Problems()
    if shots < 1:
        raise PimergeError(f"--shots is {shots}, expected at least 1")
    chosen: list[int] = []
    order = permutation(len(labels), seed)
    groups = [f"the class '{name}' has" for name in names] or ["there are"]
    for index, group in enumerate(groups):
        members = [i for i in order if labels[i] == index]
        if len(members) < shots:
            problems.add(f"{group} {len(members)} examples, {shots} were asked for", "ask for fewer --shots")
        chosen += members[:shots]
    problems.raise_any(f"{shots} shots cannot be drawn from each class")
    return sorted(chosen)


def sample_sentences(held: Sequence[set[int]], shots: int, seed: int, names: Sequence[str]) -> list[int]:
    """Draw sentences by a seed until ``shots`` of them hold each class that some sentence holds.

    One after the other, each sentence is taken that holds a class of which there are not enough yet.

    Args:
        held: the classes that each sentence holds.
        names: of the classes.

    Raises:
        PimergeError: naming each class that fewer sentences hold.

    >>> sample_sentences([{0}, {0, 1}, {0}, {1}], 1, seed=0, names=["O", "NAME"])
    [0, 1]
    """
    if shots < 1:
        raise PimergeError(f"--shots is {shots}, expected at least 1")
    problems = Problems()
    for index, name in enumerate(names):
        if 0 < (there := sum(index in classes for classes in held)) < shots:
            problems.add(f"{there} sentences hold the class '{name}', {shots} were asked for", "ask for fewer --shots")
    problems.raise_any(f"{shots} sentences cannot be drawn of each class")
    counts: Counter[int] = Counter()
    chosen = []
    for index in permutation(len(held), seed):
        if any(counts[label] < shots for label in held[index]):
            chosen.append(index)
            counts.update(held[index])
    return sorted(chosen)


def permutation(length: int, seed: int) -> list[int]:
    """The numbers below ``length`` in an order that the seed gives.

    >>> permutation(3, seed=0)
    [2, 0, 1]
    """
    import torch

    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


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
    import torch

    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(labels)):
        members = [index for index, value in enumerate(labels) if value == label]
        yield [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]


def _apart(labels: Sequence[int], held_out: set[int]) -> tuple[list[int], list[int]]:
    return [index for index in range(len(labels)) if index not in held_out], sorted(held_out)
