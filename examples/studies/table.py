"""Print comparisons side by side as Markdown: a row per method; a column per comparison, number of shots and test set.

    python examples/studies/table.py [--against METHOD] [LABEL=]comparison.json ...

A cell is the mean ± sd over the seeds, times 100, and the paired difference to a method with its 95 % interval. If a
comparison does not have that method, the runs of the first one that has it, with the same shots and test set, are
used.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pimerge.evaluation.paired_stats import paired_difference

Scores = Mapping[int, float]
"""Seed → score."""


class Column(NamedTuple):
    """The heading of a column."""

    label: str
    shots: int | None
    test: str


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--against")
    parser.add_argument("comparisons", nargs="+")
    arguments = parser.parse_args()
    cells: dict[tuple[str, int], dict[Column, dict[int, float]]] = {}
    for argument in arguments.comparisons:
        label, _, path = argument.rpartition("=")
        for run in json.loads(Path(path).read_text(encoding="utf-8"))["runs"]:
            for test, score in run["scores"].items():
                row = cells.setdefault((run["method"], run["k"]), {})
                row.setdefault(Column(label, run["shots"], test), {})[run["seed"]] = 100 * score
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    labels = [column.label for column in columns]
    columns.sort(key=lambda column: labels.index(column.label))
    rival = next((row for (method, _), row in cells.items() if method == arguments.against), {})
    print_row(["method", *titles(columns)])
    print_row(["---"] * (1 + len(columns)))
    for (method, k), row in cells.items():
        against = {} if row is rival else rival
        name = f"{method}, {k} experts" if k > 1 else method
        print_row([name, *(cell(row.get(column), reference(against, column)) for column in columns)])


def titles(columns: list[Column]) -> list[str]:
    """Column headings: only the parts in which the columns differ.

    >>> titles([Column("", 1, "test"), Column("", None, "test")])
    ['1 shot', 'all']
    """
    parts = [
        [
            column.label,
            "all" if column.shots is None else f"{column.shots} shot{'s' * (column.shots > 1)}",
            "test" if column.test == "test" else f"on {column.test}",
        ]
        for column in columns
    ]
    differ = [len({part[place] for part in parts}) > 1 for place in range(3)]
    shown = [", ".join(text for text, told in zip(part, differ, strict=True) if told and text) for part in parts]
    return shown if any(differ) else ["accuracy"]


def reference(rival: Mapping[Column, Scores], column: Column) -> Scores | None:
    """The scores that a cell is compared with: the rival's in that column, else in the first comparison with them."""
    near = (scores for other, scores in rival.items() if other[1:] == column[1:])
    return rival.get(column) or next(near, None)


def cell(scores: Scores | None, against: Scores | None) -> str:
    """Mean ± sd, and the paired difference to other scores with its interval.

    >>> cell({0: 50.0, 1: 52.0}, {0: 49.0, 1: 50.0})
    '51.0 ± 1.4 (+1.5 [-4.9, +7.9])'
    """
    if not scores:
        return "–"
    values = list(scores.values())
    text = f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
    seeds = sorted(scores.keys() & against.keys()) if against else []
    if not against or not seeds:
        return text
    found = paired_difference([scores[seed] for seed in seeds], [against[seed] for seed in seeds])
    interval = "" if found.low is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{text} ({found.mean:+.1f}{interval})"


def print_row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
