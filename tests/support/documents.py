"""Documents that reports and plots read."""

from __future__ import annotations

import statistics
from typing import Any

from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine, ComparisonRun

CONTROLS = {"head": (0,), "scratch": (0,)}


def score(method: str, number: int | None, k: int, seed: int, test: str) -> float:
    """Some number in [0, 1] of its own."""
    return len(method) / 40 + (number or 50) / 200 + k / 50 + seed / 100 - (0.05 if test != "test" else 0)


def comparison(
    methods: list[str],
    numbers: tuple[int | None, ...] = (1, 5, None),
    ks: tuple[int, ...] = (1, 2, 4),
    tests: tuple[str, ...] = ("test", "noisy"),
    metric: str = "accuracy",
) -> ComparisonDocument:
    """Two seeds of everything; controls without experts."""
    runs, lines = [], []
    for method in methods:
        for number in numbers:
            for k in CONTROLS.get(method, ks):
                own = [{test: score(method, number, k, seed, test) for test in tests} for seed in (0, 1)]
                for seed, scores in enumerate(own):
                    runs.append(
                        ComparisonRun(
                            method=method,
                            shots=number,
                            seed=seed,
                            k=k,
                            experts=[],
                            scores=scores,
                            losses={},
                            trained_parameters=1,
                            deployed_parameters=1,
                            epochs=1,
                            seconds=1,
                        )
                    )
                for test in tests:
                    values = [scores[test] for scores in own]
                    fields: dict[str, Any] = {"trained_parameters": 1, "deployed_parameters": 1, "seconds": 1.0}
                    lines.append(
                        ComparisonLine(
                            method=method,
                            control=method in CONTROLS,
                            shots=number,
                            k=k,
                            test=test,
                            seeds=2,
                            mean=statistics.fmean(values),
                            sd=statistics.stdev(values),
                            **fields,
                        )
                    )
    return ComparisonDocument(
        target="X", base="base", metric=metric, options={}, experts=[], runs=runs, lines=lines, conclusion="none"
    )


EVIL = "<img src=x onerror=alert(1)>"


SCORES = {"b": 0.25, EVIL: 0.5, "c": 0.125}
