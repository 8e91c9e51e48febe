"""Mean over tensors of the cosine of F_a/(F_a+F_b+ε) and F_b/(F_a+F_b+ε): π-Tuning's released code.

The normalisation is Task2Vec's (arXiv 1902.03545, section 3) with ε = 1e-6. The mean over one cosine per parameter
tensor is taken as in the notebook of github.com/TencentARC/pi-Tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pimerge.embedding.store_view import StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity
from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILON = 1e-6


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the mean cosine with each candidate, in [0, 1]; 0 for a tensor that is zero in either."""
    keys = members[0].parameters
    parts = rows_by_name(members[: candidates + 1], keys, StoreView.fisher)
    cosines = np.stack([share_cosines(rows[0], rows[1:]) for _, rows in parts], 1)
    # the mean of cosines is the cosine of embeddings whose parts all have norm 1
    return Similarity(keys, cosines, np.ones((1, len(keys))), np.ones_like(cosines))


def share_cosines(first: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for each of the others, the cosine of its share and the first one's share in their sum; 0 if one is zero.

    >>> share_cosines(np.array([1.0, 3.0]), np.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    total = first + others + EPSILON
    own, other = first / total, others / total
    norms = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    cosines: NDArray[np.float64] = np.minimum((own * other).sum(1) / np.where(norms > 0, norms, np.inf), 1)
    return cosines


MEASURE = Measure(
    name="task2vec",
    summary="Mean over tensors of the cosine of F_a/(F_a+F_b+ε) and F_b/(F_a+F_b+ε): π-Tuning's released code.",
    needs=Needs.FISHER,
    similarity=similarity,
    threshold=-1.0,  # without a mean to compare with, it cannot tell whether an expert helps
    same_basis=True,
)
