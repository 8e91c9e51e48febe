"""A metric of a test split and its 95 % interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pimerge.tasks.metric import METRICS, Answers

DRAWS = 1000
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(name: str, answers: Answers, seed: int = 0) -> Interval:
    """A metric with the 95 % percentile interval of a bootstrap over the examples (Efron, 1979).

    Args:
        name: name of the metric.
        answers: answers to the test split.
        seed: seed of the bootstrap.

    >>> bootstrap_interval("exact-match", Answers([None] * 4, [0] * 4, 0, list("abbb"), list("abbc"))).value
    0.75
    """
    metric = METRICS.load(name)
    statistics = metric.statistics(answers)
    n = len(statistics)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // n)
    values = []
    for start in range(0, DRAWS, at_once):
        drawn = torch.randint(n, (min(at_once, DRAWS - start), n), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        values.append(metric.value(counts @ statistics, n))
    low, high = torch.cat(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(metric.value(statistics.sum(0, keepdim=True), n)), low, high)
