"""Mean of two cosines, of the gradients' second moments and of the updates ΔW, around the pool's mean (default).

    score = ½ cos(G_target − Ḡ, G_n − Ḡ) + ½ cos(ΔW_target − Δ̄, ΔW_n − Δ̄)

G is the Fisher information on the output side of the adapted layers, E[g gᵀ] with g = ∂ log p(y|x)/∂(output), at
unit norm for each layer so that no layer decides alone (the factor of the outputs in K-FAC, arXiv 1503.05671). The
first cosine tells whether two tasks ask the same of the layers, the second whether their experts answered alike.
Neither depends on the basis, the rank or the init of the factors. Both are seen in up to 64 random directions of the
outputs and inputs of each layer (:mod:`pimerge.embedding.random_projection`), so that all of it is in the store. Where
the target or a
candidate is of a kind without ΔW, the first cosine alone compares all of them, at the layers that they have in common.
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
    """The score of each candidate, in [−1, 1].

    A part that is zero counts as 0; a target without an update, at the pool's init, or experts of kinds that have
    none, have the first cosine alone.
    """
    parts = {"gradients": unit_parts(members, GRADIENT)}
    target = members[0].moments(f"{UPDATE}.{layer}" for layer in members[0].layers(UPDATE))
    compared = members[: candidates + 1]
    if all(member.expert.modules for member in compared) and any(update.any() for update in target.values()):
        parts["update"] = parts_of(members, UPDATE)
    # to read and to multiply, which takes long in large pools, releases the interpreter's lock
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
