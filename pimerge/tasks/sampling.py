"""Which examples are drawn, by a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pimerge.core.errors import PimergeError, Problems


def draw_shots(labels: Sequence[int], shots: int, seed: int, names: Sequence[str]) -> list[int]:
    """Draw ``shots`` examples of each class, by a seed; the indices come back in the order of the data.

    Args:
        labels: the class of each example.
        names: of the classes; none if all examples are one group, of the class 0.

    Raises:
        PimergeError: naming each class with fewer examples.

    >>> draw_shots([0, 1, 0, 1, 0], 1, seed=0, names=["even", "odd"])
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


def draw_holding(held: Sequence[set[int]], shots: int, seed: int, names: Sequence[str]) -> list[int]:
    """Draw sentences by a seed until ``shots`` of them hold each class that some sentence holds.

    One after the other, each sentence is taken that holds a class of which there are not enough yet.

    Args:
        held: the classes that each sentence holds.
        names: of the classes.

    Raises:
        PimergeError: naming each class that fewer sentences hold.

    >>> draw_holding([{0}, {0, 1}, {0}, {1}], 1, seed=0, names=["O", "NAME"])
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
