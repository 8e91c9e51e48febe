"""Cosine of the numbers in the factors A and B themselves, as they are stored.

The cosine is taken over all modules together: the numbers of A, of B and of a bias of B form one long vector,
and no scaling is applied. One (BR, R⁻¹A) of the same ΔW has other numbers, so it tells something only among
experts of one init.
"""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.similarity import Similarity, from_vectors
from pimerge.stored import Stored, rows_by_name

NEEDS = "experts"
SAME_BASIS = True
GATE = -1.0  # without a mean to compare with it cannot tell that an expert does not help


def similarity(members: Sequence[Stored], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """The cosines of all numbers, in [−1, 1]; no mean is subtracted."""
    parts = rows_by_name(
        members[: candidates + 1], members[0].parameters, lambda member, keys: member.expert.file.arrays(keys)
    )
    return from_vectors(parts, candidates)
