"""Cosine of the layers' Fisher information by its marginals E[g²] ⊗ E[x²], around the pool's mean.

For each adapted layer the embedding is the outer product of E[g_i²] (d_out) and E[x_j²] (d_in) at unit norm. It would
be the diagonal Fisher information of the layer's weight if gradients and inputs were independent (K-FAC, arXiv
1503.05671). Thus ⟨e_a, e_b⟩ = cos(g_a, g_b) · cos(x_a, x_b), which does not depend on rank, init or basis of factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pimerge.embedding.store_view import INPUT, OUTPUT, StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity, from_grams, unit
from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the cosines around the mean of the ``pool``, in [−1, 1]."""
    outputs, inputs = unit_parts(members, OUTPUT), unit_parts(members, INPUT)
    grams = ((layer, (g @ g.T) * (x @ x.T)) for (layer, g), (_, x) in zip(outputs, inputs, strict=True))
    return from_grams(grams, candidates, pool, sampled)


def unit_parts(members: Sequence[StoreView], part: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each layer with one part of its second moments at unit norm (N × numbers); 0 for a member without it."""
    return ((layer, unit(rows)) for layer, rows in parts_of(members, part))


def parts_of(members: Sequence[StoreView], part: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each layer with one part of its second moments (N × numbers); 0 for a member without that layer."""
    layers = sorted({layer for member in members for layer in member.layers(part)})
    found = rows_by_name(members, [f"{part}.{layer}" for layer in layers], StoreView.moments)
    return ((layer, rows) for layer, (_, rows) in zip(layers, found, strict=True))


MEASURE = Measure(
    name="marginals",
    summary="Cosine of the layers' Fisher information by its marginals E[g²] ⊗ E[x²], around the pool's mean.",
    needs=Needs.SECOND_MOMENTS,
    similarity=similarity,
)
