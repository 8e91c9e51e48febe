"""The weights of the experts, shared by the methods."""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.core.errors import PimergeError


def mean(count: int, given: Sequence[float] | None) -> list[float]:
    """The weights as given, or 1/N each.

    >>> mean(4, None)
    [0.25, 0.25, 0.25, 0.25]
    """
    return [1 / count] * count if given is None else list(given)


def ones(count: int, given: Sequence[float] | None) -> list[float]:
    """The weights as given, or 1 each.

    >>> ones(2, None)
    [1.0, 1.0]
    """
    return [1.0] * count if given is None else list(given)


def shares(count: int, given: Sequence[float] | None) -> list[float]:
    """The weights as given, or 1/N each, where only their ratios count.

    Raises:
        PimergeError: if one is negative, or all are 0.

    >>> shares(2, [3, 1])
    [3, 1]
    """
    weights = mean(count, given)
    if min(weights) < 0 or not any(weights):
        raise PimergeError(
            f"the weights are {', '.join(f'{weight:g}' for weight in weights)}",
            "expected none below 0, and at least one above: only their ratios count here",
        )
    return weights
