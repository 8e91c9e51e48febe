"""Mean over tensors of the cosine of F_a/(F_a+F_b+ε) and F_b/(F_a+F_b+ε): π-Tuning's released code.

The normalisation is Task2Vec's (arXiv 1902.03545, section 3), with ε = 1e-6 and one cosine per parameter
tensor, averaged, as the notebook of github.com/TencentARC/pi-Tuning has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = "fisher"
SAME_BASIS = True
EPSILON = 1e-6


def scores(target: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The mean cosine with each candidate, in [0, 1]; a tensor that is zero in either counts as 0.

    >>> import torch
    >>> [round(s, 3) for s in scores({"w": torch.tensor([1.0, 3.0])}, [{"w": torch.tensor([1.0, 3.0])}])]
    [1.0]
    """
    return [_mean_cosine(target, candidate) for candidate in candidates]


def _mean_cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    cosines = []
    for key in sorted(first):
        a, b = first[key].double().flatten(), second[key].double().flatten()
        total = a + b + EPSILON
        a, b = a / total, b / total
        norms = a.norm() * b.norm()
        cosines.append(float(a @ b / norms) if norms > 0 else 0.0)
    return sum(cosines) / len(cosines)
