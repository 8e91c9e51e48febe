"""Expected gain over the bare base in accuracy, from the held-out probe and label-CKA together (default).

    gain = w_p · (probe(candidate) − probe(base)) + w_c · (CKA(candidate) − CKA(base))
           + w_s · (1/K − 1/K_e) · scale · fisher(target, candidate)

The last part counts where the target has an expert in the store that saw K_e examples a class, more than the K looked
at: the measure ``fisher`` then knows what these few cannot tell.

The weights, without an intercept, so that the base itself has the gain 0, are rounded from least-squares fits of the
true gains of development pools; a fit on one pool foretells the others nearly as well as their own
(``examples/benchmarks/ranking.py``). With one example a class nothing can be held out, and label-CKA alone says little:
its weight there is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pimerge.measures import label_cka, probe

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.sample import Sample

NEEDS = "examples"
READS_ANSWERS = False
PROBE_WEIGHT = 0.14
CKA_WEIGHT = 0.21
CKA_WEIGHT_ALONE = 0.1
STORE_WEIGHT = 1.3


def scores(sample: Sample, weights: Tensor) -> Tensor:
    """The weighted sum; its difference to the base's is the expected gain, 0.01 being a point of accuracy.

    Args:
        sample: needs vectors (n × d) and labels.
        weights: (draws × n) float64, how often each example counts.

    Returns:
        (draws) float64.

    >>> from pimerge.sample import Sample
    >>> x = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.9]], dtype=torch.float64)
    >>> ones = torch.ones(1, 4, dtype=torch.float64)
    >>> good, bad = (scores(Sample(x, torch.tensor(y), 2), ones) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    >>> bool(good > bad)
    True
    """
    parts = parts_of(sample)
    total = torch.zeros(len(weights), dtype=torch.float64)
    for name, weight in part_weights(sample).items():
        total += weight * parts[name](sample, weights)
    return total


def part_weights(sample: Sample) -> dict[str, float]:
    """The weight of each part that these examples allow: a probe needs two examples of a class."""
    if sample.labels.bincount().max() < 2:
        return {"label-cka": CKA_WEIGHT_ALONE}
    return {"probe": PROBE_WEIGHT, "label-cka": CKA_WEIGHT}


def store_weight(seen: float, by_expert: float) -> float:
    """Expected gain at full strength for a similarity of 1 in the store.

    Args:
        seen: examples a class that are looked at; of less than two the weight is that of two.
        by_expert: examples a class that the target's expert was embedded with.

    >>> round(store_weight(5, 50), 3), store_weight(16, 16)
    (0.234, 0.0)
    """
    return STORE_WEIGHT * max(0.0, 1 / max(seen, 2.0) - 1 / max(by_expert, 2.0))


def parts_of(sample: Sample) -> dict[str, Callable[[Sample, Tensor], Tensor]]:
    """The scores of each part that these examples allow."""
    parts = {"probe": probe.scores, "label-cka": label_cka.scores}
    return {name: parts[name] for name in part_weights(sample)}
