"""Cosine of the Fisher of the factors B, unit norm per tensor, pool mean subtracted.

With F_t the diagonal of tensor t, e_n = concat_t F_t/‖F_t‖ over the factors B, and the score is
cos(e_target − ē, e_n − ē), where ē is the mean over the target and all candidates. The norm per tensor keeps
a few huge entries from deciding; the mean holds what all tasks share. Compare arXiv 2304.14381, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pimerge.kinds.lora import is_B_factor

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = "fisher"
SAME_BASIS = True
MIN_TO_CENTRE = 3


def scores(target: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The cosines, in [−1, 1]; 0 for an embedding that is the mean itself.

    The mean is subtracted only from three embeddings on: two are exactly opposite to each other around it.

    >>> key = "base_model.model.q.lora_B.weight"
    >>> e = [{key: torch.tensor(v)} for v in ([[1.0, 0.0]], [[0.9, 0.1]], [[0.0, 1.0]])]
    >>> [round(s, 2) for s in scores(e[0], e[1:])]
    [0.99, -1.0]
    """
    embeddings = torch.stack([_unit_tensors(diagonal) for diagonal in (target, *candidates)])
    if len(embeddings) >= MIN_TO_CENTRE:
        embeddings = embeddings - embeddings.mean(0)
    norms = embeddings.norm(dim=1)
    unit = embeddings / torch.where(norms > 1e-12, norms, torch.inf)[:, None]
    cosines: list[float] = (unit[1:] @ unit[0]).clamp(-1, 1).tolist()
    return cosines


def _unit_tensors(diagonal: Mapping[str, Tensor]) -> Tensor:
    parts = []
    for key in sorted(filter(is_B_factor, diagonal)):
        part = diagonal[key].double().flatten()
        norm = part.norm()
        parts.append(part / norm if norm > 0 else part)
    return torch.cat(parts)
