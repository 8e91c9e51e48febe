"""A weighted sum of the updates: ΔW = Σ α_n ΔW_n (π-Tuning, arXiv 2304.14381, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor

SPACE = "linear"
JOINS_TARGET = True


def weights(count: int, given: Sequence[float] | None) -> list[float]:
    """The weights as given; they need not sum to 1.

    Raises:
        PimergeError: if none are given.

    >>> weights(2, [0.7, 0.3])
    [0.7, 0.3]
    """
    if given is None:
        raise PimergeError(
            "'interpolated' needs weights", "run 'pimerge rank' first, or pass --weights 0.6,0.4 in the experts' order"
        )
    return list(given)


def coefficients(weights: Tensor) -> Tensor:
    """The weights: (experts) → (experts)."""
    return weights
