"""Paired statistics of a comparison: the difference of each method to the best control, with its interval.

Runs are paired by seed: runs with one seed have the same examples and the same ranking.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pimerge.evaluation.schema import ComparisonLine, ComparisonRun
from pimerge.tasks.metric import METRICS

LEVEL = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences with a two-sided t-interval.

    Attributes:
        low, high: bounds of the interval; None for a single pair.
    """

    mean: float
    low: float | None
    high: float | None


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> PairedDifference:
    """Compute mean(d) ± t(level, n − 1) · sd(d) / √n for the differences d of n pairs.

    >>> found = paired_difference([0.8, 0.7, 0.9], [0.6, 0.6, 0.6])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (0.2, -0.048, 0.448)
    """
    from scipy.stats import t

    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None, None)
    half = float(t.ppf((1 + level) / 2, len(differences) - 1)) * statistics.stdev(differences)
    half /= math.sqrt(len(differences))
    return PairedDifference(mean, mean - half, mean + half)


def lines_of(runs: Sequence[ComparisonRun], controls: Sequence[str]) -> list[ComparisonLine]:
    """Summarise the runs in a line for each method, number of shots, number of experts and test set.

    The lines are in the order of the runs. The best control at a number of shots is the one with the highest mean, over
    all numbers of experts; its own line has no difference.
    """
    cells: dict[tuple[str, int | None, int, str], dict[int, ComparisonRun]] = {}
    for run in runs:
        for test in run.scores:
            cells.setdefault((run.method, run.shots, run.k, test), {})[run.seed] = run
    scores = {cell: {seed: run.scores[cell[3]] for seed, run in found.items()} for cell, found in cells.items()}
    lines = []
    for cell, found in cells.items():
        method, shots, k, test = cell
        rivals = [key for key in cells if key[0] in controls and key[1] == shots and key[3] == test]
        best = max(rivals, key=lambda key: statistics.fmean(scores[key].values()), default=None)
        seeds = sorted(set(scores[cell]) & set(scores[best])) if best is not None and best != cell else []
        difference = None
        if best and seeds:
            difference = paired_difference([scores[cell][s] for s in seeds], [scores[best][s] for s in seeds])
        values = [scores[cell][seed] for seed in sorted(found)]
        last = next(iter(found.values()))
        lines.append(
            ComparisonLine(
                method=method,
                control=method in controls,
                shots=shots,
                k=k,
                test=test,
                seeds=len(values),
                mean=statistics.fmean(values),
                sd=statistics.stdev(values) if len(values) > 1 else 0.0,
                difference=difference.mean if difference else None,
                low=difference.low if difference else None,
                high=difference.high if difference else None,
                trained_parameters=last.trained_parameters,
                deployed_parameters=last.deployed_parameters,
                seconds=statistics.fmean(run.seconds for run in found.values()),
            )
        )
    return lines


def conclusion(runs: Sequence[ComparisonRun], controls: Sequence[str], metric: str) -> str:
    """Say in one sentence which method won, or that none can be told from the best control.

    A method wins at a number of shots if the interval of its paired difference to the best control lies above zero, at
    a level that holds for all comparisons at once (Bonferroni).
    """
    lines = [line for line in lines_of(runs, controls) if line.test == "test"]
    tried = [line for line in lines if not line.control and line.difference is not None]
    if not any(line.control for line in lines):
        return "Without a control no gain can be told from what a fresh expert would have had."
    if not tried:
        return "Nothing but controls was run."
    if all(line.low is None for line in tried):
        return "With one seed no method can be told from another: more seeds are needed."
    level = 1 - (1 - LEVEL) / len(tried)
    found = []
    for shots in dict.fromkeys(line.shots for line in tried):
        best = max((line for line in lines if line.control and line.shots == shots), key=lambda line: line.mean)
        sure = []
        for line in (line for line in tried if line.shots == shots and line.difference is not None):
            by_seed = {run.seed: run.scores["test"] for run in runs if _is_of(run, line)}
            other = {run.seed: run.scores["test"] for run in runs if _is_of(run, best)}
            seeds = sorted(by_seed.keys() & other.keys())
            result = paired_difference([by_seed[s] for s in seeds], [other[s] for s in seeds], level)
            if result.low is not None and result.low > 0:
                sure.append((result, line))
        where = "with all examples" if shots is None else f"at {shots} shots" if shots > 1 else "at 1 shot"
        control = f"the best control ({best.method}, {best.mean:{METRICS.load(metric).format}})"
        if sure:
            result, line = max(sure, key=lambda pair: pair[0].mean)
            found.append(f"{where} {line.method} beats {control} by {_gain(result)}")
        else:
            found.append(f"{where} no method can be told from {control}")
    several = f", at a level that holds for all {len(tried)} comparisons" if len(tried) > 1 else ""
    sentence = "; ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}{several}."


def _is_of(run: ComparisonRun, line: ComparisonLine) -> bool:
    return (run.method, run.shots, run.k) == (line.method, line.shots, line.k)


def _gain(result: PairedDifference) -> str:
    def points(value: float | None) -> str:
        return f"{100 * (value or 0.0):.1f}"

    return f"{points(result.mean)} points [{points(result.low)}, {points(result.high)}]"
