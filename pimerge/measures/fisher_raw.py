"""Cosine of the whole raw diagonal Fisher: the paper's measure (arXiv 2304.14381, section 3.2).

On real pools it ranks near chance, since a few huge entries decide it; ``fisher`` mends that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = "fisher"
SAME_BASIS = True


def scores(target: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """cos(F_target, F_n) over all parameters, in [0, 1]; 0 if one of them is zero.

    >>> [round(s, 3) for s in scores({"w": torch.tensor([3.0, 4.0])}, [{"w": torch.tensor([4.0, 3.0])}])]
    [0.96]
    """
    vectors = torch.stack([_flat(diagonal) for diagonal in (target, *candidates)])
    norms = vectors.norm(dim=1)
    unit = vectors / torch.where(norms > 0, norms, torch.inf)[:, None]
    cosines: list[float] = (unit[1:] @ unit[0]).clamp(-1, 1).tolist()
    return cosines


def _flat(diagonal: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([diagonal[key].double().flatten() for key in sorted(diagonal)])
