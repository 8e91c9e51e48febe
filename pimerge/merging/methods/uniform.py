"""The mean of the updates: ΔW = (1/N) Σ ΔW_n (arXiv 2402.15414, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.core.errors import PimergeError
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._weights import unchanged


def weights(count: int, given: Sequence[float] | None) -> list[float]:
    """Return 1/N for each expert, and refuse given weights.

    >>> weights(4, None)
    [0.25, 0.25, 0.25, 0.25]
    """
    if given is not None:
        raise PimergeError("'uniform' takes no weights", "use --method interpolated, or leave the weights out")
    return [1 / count] * count


METHOD = MergeMethod(
    name="uniform",
    summary="The mean of the updates.",
    formula="ΔW = (1/N) Σ ΔW_n",
    paper="arXiv 2402.15414, section 3.1",
    space=Space.LINEAR,
    averages=True,
    weights=weights,
    coefficients=unchanged,
)
