"""Cosine of the layers' Fisher information by its marginals E[g²] ⊗ E[x²], around the pool's mean.

For every adapted layer the embedding is the outer product of E[g_i²] (d_out) and E[x_j²] (d_in) at unit norm: the
diagonal Fisher of the layer's own weight, if gradients and inputs were independent (K-FAC, arXiv 1503.05671). So
⟨e_a, e_b⟩ = cos(g_a, g_b) · cos(x_a, x_b), and no rank, init or basis of any factors is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pimerge.marginals import INPUT, OUTPUT
from pimerge.similarity import Similarity, from_grams, unit

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.store import Stored

NEEDS = "marginals"
SAME_BASIS = False
GATE = 0.0


def similarity(members: Sequence[Stored], candidates: int, pool: Sequence[int]) -> Similarity:
    """The cosines around the mean of the ``pool``, in [−1, 1]."""
    outputs, inputs = unit_parts(members, OUTPUT), unit_parts(members, INPUT)
    grams = ((layer, (g @ g.T) * (x @ x.T)) for (layer, g), (_, x) in zip(outputs, inputs, strict=True))
    return from_grams(grams, candidates, pool)


def unit_parts(members: Sequence[Stored], part: str) -> Iterator[tuple[str, Tensor]]:
    """For each layer, (N × numbers) one part of the marginals at unit norm; 0 for a member without that layer."""
    names = [set(member.layers) for member in members]
    for layer in sorted(set().union(*names)):
        owners = [index for index, own in enumerate(names) if layer in own]
        parts = unit(torch.stack([members[index].marginal(f"{layer}.{part}").flatten() for index in owners]))
        yield (
            layer,
            torch.zeros(len(members), parts.shape[1], dtype=parts.dtype).index_copy_(0, torch.tensor(owners), parts),
        )
