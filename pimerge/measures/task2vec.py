"""Mean over tensors of the cosine of F_a/(F_a+F_b+ε) and F_b/(F_a+F_b+ε): π-Tuning's released code.

The normalisation is Task2Vec's (arXiv 1902.03545, section 3), with ε = 1e-6 and one cosine per parameter
tensor, averaged, as the notebook of github.com/TencentARC/pi-Tuning has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pimerge.similarity import Similarity

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.store import Stored

NEEDS = "fisher"
SAME_BASIS = True
GATE = -1.0  # without a mean to compare with it cannot tell that an expert does not help
EPSILON = 1e-6


def similarity(members: Sequence[Stored], candidates: int, pool: Sequence[int]) -> Similarity:
    """The mean cosine with each candidate, in [0, 1]; a tensor that is zero in either counts as 0."""
    keys = list(members[0].parameters)
    cosines = torch.zeros(candidates, len(keys), dtype=torch.float64)
    for column, key in enumerate(keys):
        target = members[0].fisher(key).double().flatten()
        for row, member in enumerate(members[1 : candidates + 1]):
            cosines[row, column] = share_cosine(target, member.fisher(key).double().flatten())
    # the mean of cosines is the cosine of embeddings whose parts all have the norm 1
    return Similarity(keys, cosines, torch.ones(1, len(keys), dtype=torch.float64), torch.ones_like(cosines))


def share_cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of each one's share in the sum; 0 if one of them is zero.

    >>> share_cosine(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    1.0
    """
    total = first + second + EPSILON
    first, second = first / total, second / total
    norms = first.norm() * second.norm()
    return float((first @ second / norms).clamp(max=1)) if norms > 0 else 0.0
