"""A weighted sum of the updates: ΔW = Σ α_n ΔW_n (π-Tuning, arXiv 2304.14381, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.core.errors import PimergeError
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._weights import unchanged


def weights(count: int, given: Sequence[float] | None) -> list[float]:
    """Return the given weights, which need not sum to 1.

    >>> weights(2, [0.7, 0.3])
    [0.7, 0.3]
    """
    if given is None:
        raise PimergeError(
            "'interpolated' needs weights", "run 'pimerge rank' first, or pass --weights 0.6,0.4 in the experts' order"
        )
    return list(given)


METHOD = MergeMethod(
    name="interpolated",
    summary="A weighted sum of the updates.",
    formula="ΔW = Σ w_n ΔW_n",
    paper="π-Tuning, arXiv 2304.14381, eq. 4",
    space=Space.LINEAR,
    joins_target=True,
    weights_by_score=True,
    averages=True,
    weights=weights,
    coefficients=unchanged,
)
