"""Gains of the pool's experts for the pool's other targets, weighted by the similarity of those targets to this one.

    gain(target, s) = Σ_t w_t gain(t, s) / Σ_t w_t,   w_t = exp(similarity(target, t) / 0.1)

over the targets t that ``rank --calibrate`` measured, except s itself and the target. The similarity is the score of
the measure ``fisher``. If the target has no expert, all weights are equal, and the score is a source's mean gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pimerge.ranking.measure import Measure, Needs

TEMPERATURE = 0.1


def predicted(
    gains: Mapping[str, Mapping[str, Mapping[float, float]]], similarities: Mapping[str, float], source: str
) -> tuple[float, float, float] | None:
    """The best strength of a source, its expected gain there and the standard error of that weighted mean.

    Args:
        gains: target → source → strength → gain in accuracy (0.01 is a point).
        similarities: target → similarity to the target that is asked about; the others count as 0.

    Returns:
        None if the source was measured for no target; the error is infinite if it was for one alone.

    >>> gains = {"a": {"s": {1.0: 0.02}}, "b": {"s": {1.0: 0.04}}}
    >>> strength, gain, error = predicted(gains, {}, "s")
    >>> strength, round(gain, 4), round(error, 4)
    (1.0, 0.03, 0.01)
    """
    known = {target: sources[source] for target, sources in gains.items() if target != source and source in sources}
    if not known:
        return None
    weights = {target: math.exp(similarities.get(target, 0.0) / TEMPERATURE) for target in known}
    whole = sum(weights.values())
    shares = {target: weight / whole for target, weight in weights.items()}
    strengths = sorted(set.intersection(*(set(by_scale) for by_scale in known.values())))
    means = {
        strength: sum(share * known[target][strength] for target, share in shares.items()) for strength in strengths
    }
    best = max(strengths, key=lambda strength: means[strength])
    return best, means[best], _standard_error([(shares[t], known[t][best]) for t in known], means[best])


def _standard_error(weighted: list[tuple[float, float]], mean: float) -> float:
    """Return the standard error of a weighted mean, from its effective number of values."""
    effective = 1 / sum(share**2 for share, _ in weighted)
    if effective <= 1 + 1e-9:
        return math.inf
    variance = sum(share * (value - mean) ** 2 for share, value in weighted) * effective / (effective - 1)
    return math.sqrt(variance / effective)


MEASURE = Measure(
    name="history",
    summary="Gains of the pool's experts for its other targets, weighted by their similarity to this target.",
    needs=Needs.HISTORY,
    predict=predicted,
)
