"""Cosines of the gradients' second moments and of the updates ΔW, each around the pool's mean, halved (default).

    score = ½ cos(G_target − Ḡ, G_n − Ḡ) + ½ cos(ΔW_target − Δ̄, ΔW_n − Δ̄)

G is the Fisher information on the output side of the adapted layers, E[g gᵀ] with g = ∂ log p(y|x)/∂(output), at
unit norm for each layer so that no layer decides alone (the factor of the outputs in K-FAC, arXiv 1503.05671), seen
in up to 64 random directions. The first cosine tells whether two tasks ask the same of the layers, the second whether
their experts answered alike. Neither depends on the basis, the rank or the init of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.marginals import GRADIENT
from pimerge.measures import delta
from pimerge.measures.marginals import unit_parts
from pimerge.similarity import Similarity, balanced, from_vectors

if TYPE_CHECKING:
    from pimerge.store import Stored

NEEDS = "marginals"
SAME_BASIS = False
GATE = 0.02


def similarity(members: Sequence[Stored], candidates: int, pool: Sequence[int]) -> Similarity:
    """The score of each candidate, in [−1, 1].

    A part that is zero counts as 0; a target without an update, at the pool's init, has the first cosine alone.
    """
    gradients = from_vectors(unit_parts(members, GRADIENT), candidates, pool)
    target = members[0].expert
    if not any(bool(target.tensor(module.B).any()) for module in target.modules.values()):
        return gradients
    return balanced([gradients, delta.similarity(members, candidates, pool)], ["gradients", "update"])
