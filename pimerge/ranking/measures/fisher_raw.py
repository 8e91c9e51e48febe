"""Cosine of the whole raw diagonal Fisher: the paper's measure (arXiv 2304.14381, section 3.2).

On real pools it ranks hardly better than chance, since a few large entries decide it; ``fisher`` corrects that.
"""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.embedding.store_view import StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity, from_vectors
from pimerge.ranking.measure import Measure, Needs


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute cos(F_target, F_n) over all parameters, in [0, 1]; no mean is subtracted."""
    return from_vectors(rows_by_name(members[: candidates + 1], members[0].parameters, StoreView.fisher), candidates)


MEASURE = Measure(
    name="fisher-raw",
    summary="Cosine of the whole raw diagonal Fisher: the paper's measure (arXiv 2304.14381, section 3.2).",
    needs=Needs.FISHER,
    similarity=similarity,
    threshold=-1.0,  # without a mean to compare with, it cannot tell whether an expert helps
    same_basis=True,
)
