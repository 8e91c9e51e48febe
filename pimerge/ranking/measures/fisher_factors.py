"""Cosine of the diagonal Fisher of the factors B, unit norm per tensor, around the pool's mean.

The score is cos(e_target − ē, e_n − ē) with e_n = concat_t F_t/‖F_t‖ over the factors B, F_t the diagonal of tensor t,
and ē the pool's mean. Unit norm per tensor keeps a few large entries from deciding the score; subtracting the mean
removes the part that all tasks share. Compare arXiv 2304.14381, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.adapters.kinds.lora import is_B_factor
from pimerge.embedding.store_view import StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity, from_vectors, unit
from pimerge.ranking.measure import Measure, Needs


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the cosines, in [−1, 1]; 0 for an embedding that equals the mean."""
    keys = [key for key in members[0].parameters if is_B_factor(key)]
    parts = ((key, unit(rows)) for key, rows in rows_by_name(members, keys, StoreView.fisher))
    return from_vectors(parts, candidates, pool, sampled)


MEASURE = Measure(
    name="fisher-factors",
    summary="Cosine of the diagonal Fisher of the factors B, unit norm per tensor, around the pool's mean.",
    needs=Needs.FISHER,
    similarity=similarity,
    same_basis=True,
    needs_update=True,
)
