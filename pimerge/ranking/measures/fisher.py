"""Mean of two cosines, of the gradients' second moments and of the updates ΔW, around the pool's mean (default).

    score = ½ cos(G_target − Ḡ, G_n − Ḡ) + ½ cos(ΔW_target − Δ̄, ΔW_n − Δ̄)

G is the Fisher information of the outputs of the adapted layers, E[g gᵀ] with g = ∂ log p(y|x)/∂(output), the output
factor of K-FAC (arXiv 1503.05671). It has unit norm in each layer, so that no layer decides alone. The first cosine
compares what two tasks require of the layers, the second how their experts changed them. Neither depends on the basis,
rank or init of the factors. Both are computed in up to 64 random directions of the outputs and inputs of each layer
(:mod:`pimerge.embedding.random_projection`), which the store holds. If the target or a candidate is of a kind without
ΔW, all are compared by the first cosine alone, at the layers that they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pimerge.adapters.expert import Expert
from pimerge.embedding.store_view import GRADIENT, UPDATE, StoreView
from pimerge.ranking.cosine import Similarity, balanced, from_vectors
from pimerge.ranking.measure import Measure, Needs
from pimerge.ranking.measures.marginals import parts_of, unit_parts


def remark(experts: Sequence[Expert]) -> str:
    """A remark on a comparison of some experts, the target among them; empty if there is none."""
    without = sorted({expert.kind for expert in experts if not expert.modules})
    return f"{', '.join(without)} have no ΔW, so all were compared by their gradients alone" if without else ""


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the score of each candidate, in [−1, 1].

    The cosine with a zero part is 0. The first cosine is used alone if the target's update is zero, as at the pool's
    init, or if an expert is of a kind without ΔW.
    """
    parts = {"gradients": unit_parts(members, GRADIENT)}
    target = members[0].moments(f"{UPDATE}.{layer}" for layer in members[0].layers(UPDATE))
    compared = members[: candidates + 1]
    if all(member.expert.modules for member in compared) and any(update.any() for update in target.values()):
        parts["update"] = parts_of(members, UPDATE)
    # reading and multiplying, which are slow for large pools, release the GIL
    with ThreadPoolExecutor(len(parts)) as threads:
        each = threads.map(lambda rows: from_vectors(rows, candidates, pool, sampled), parts.values())
        found = dict(zip(parts, each, strict=True))
    if not found["gradients"].tensors and "update" in found:  # experts of embedding layers alone
        return found["update"]
    return balanced(list(found.values()), list(found)) if len(found) > 1 else found["gradients"]


MEASURE = Measure(
    name="fisher",
    summary=(
        "Mean of two cosines, of the gradients' second moments and of the updates ΔW, around the pool's mean (default)."
    ),
    needs=Needs.SECOND_MOMENTS,
    similarity=similarity,
    threshold=0.02,
    remark=remark,
)
