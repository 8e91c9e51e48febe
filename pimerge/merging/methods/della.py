"""Drop mostly small entries at random, elect signs, and average (DELLA, arXiv 2406.11617, section 3).

1. MAGPRUNE: within each row, the entry of rank i of n by magnitude (0 is the smallest) is kept with probability
   p = density − epsilon + 2·epsilon·i/(n − 1), and divided by p. The mean of p is the density.
2. Sign election and disjoint mean, as in ``ties``. Only the ratios of the weights matter.

The paper's ε is the whole range of p, which is twice ``epsilon``. Its ranks do not reach one end of the range, whereas
these reach both. A one-dimensional tensor is one row. At density 1 all entries are kept, and epsilon has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space
from pimerge.merging.methods._drop import BREAKS, keep
from pimerge.merging.methods._options import DENSITY, SCALE, options_of
from pimerge.merging.methods._trim import elected_mean

if TYPE_CHECKING:
    from torch import Generator, Tensor

EPSILON = Option(
    "epsilon",
    float,
    "Range by which the share of entries kept varies with their magnitude.",
    lambda epsilon: epsilon >= 0,
    "at least 0",
)


def merge(
    deltas: Tensor,
    weights: Tensor,
    *,
    generators: Sequence[Generator],
    density: float = 0.5,
    epsilon: float = 0.1,
    scale: float = 1.0,
) -> Tensor:
    """Drop by rank, rescale, elect and average: (experts, *shape), (experts) → (*shape).

    Args:
        generators: one per expert, on the CPU.

    >>> import torch
    >>> generators = [torch.Generator().manual_seed(0)]
    >>> merge(torch.tensor([[1.0, -3.0]]), torch.ones(1), generators=generators, density=1.0)
    tensor([ 1., -3.])
    """
    import torch

    kept = [
        keep(delta, _chances(delta, density, epsilon if density < 1 else 0.0), generator)
        for delta, generator in zip(deltas, generators, strict=True)
    ]
    return scale * elected_mean(torch.stack(kept), weights)


def check(options: Mapping[str, Any]) -> None:
    """Refuse probabilities outside of (0, 1]."""
    density, epsilon = options["density"], options["epsilon"]
    if density < 1 and not (density - epsilon > 0 and density + epsilon <= 1):
        raise PimergeError(f"--epsilon is {epsilon:g} at --density {density:g}", "expected 0 < density ± epsilon ≤ 1")


def _chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return each entry's probability to be kept, which rises with its rank in the row: (*shape) → (*shape)."""
    import torch

    order = delta.abs().argsort(dim=-1, stable=True)
    steps = torch.linspace(-epsilon, epsilon, delta.shape[-1], dtype=torch.float64, device=delta.device)
    if len(steps) == 1:
        steps.zero_()
    chances = torch.empty_like(delta, dtype=torch.float64)
    return chances.scatter_(-1, order, (density + steps).expand_as(chances))


METHOD = MergeMethod(
    name="della",
    summary="Drop mostly small entries at random, elect signs, and average the entries that agree.",
    formula="ΔW = scale · elected_mean(m_n ⊙ ΔW_n / p_n), with p_n rising with the magnitude",
    paper="DELLA, arXiv 2406.11617, section 3",
    space=Space.ELEMENTWISE,
    needs=("generators",),
    breaks=BREAKS,
    check=check,
    merge=merge,
    options=options_of(merge, DENSITY, EPSILON, SCALE),
)
