"""Print the scores of a recipe in the form of the papers' tables: a row per method, a column per task.

    python examples/recipes/table.py TASK/scores.json ... > table.md

A cell is the task's first metric times 100 (BLEU already has that range), mean ± sd if there are several seeds.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

RUN = re.compile(r"(?P<method>.+)-(?P<shots>all|\d+)-(?P<seed>\d+)")
OWN = "its own expert, on all its data"


def main() -> None:
    """Print the table."""
    documents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    metrics = [next(iter(document["scores"][0]["metrics"])) for document in documents]
    columns = [values_of(document, metric) for document, metric in zip(documents, metrics, strict=True)]
    rows = list(dict.fromkeys(row for column in columns for row in column))
    rows.sort(key=lambda row: row[0] == OWN)
    several = len(set(metrics)) == 1 and len(columns) > 1
    titles = [f"{document['target']}, {metric}" for document, metric in zip(documents, metrics, strict=True)]
    print_row(["method", "shots", *titles, *(["mean"] if several else [])])
    print_row(["---"] * (2 + len(titles) + several))
    for method, shots in rows:
        found = [column.get((method, shots), []) for column in columns]
        mean = [cell([statistics.mean(map(statistics.mean, found))] if all(found) else [])] if several else []
        print_row([method, shots, *map(cell, found), *mean])


def values_of(document: dict[str, Any], metric: str) -> dict[tuple[str, str], list[float]]:
    """(method, shots) → its values, one for each seed."""
    values: dict[tuple[str, str], list[float]] = {}
    for score in document["scores"]:
        run = RUN.fullmatch(score["name"])
        own = OWN if score["name"] == document["target"] else score["name"]
        key = (run["method"], run["shots"]) if run else (own, "–")
        value = score["metrics"][metric]["value"]
        values.setdefault(key, []).append(value if metric == "bleu" else 100 * value)
    return values


def cell(values: list[float]) -> str:
    """Mean ± sd.

    >>> cell([50.0, 52.0]), cell([50.0]), cell([])
    ('51.0 ± 1.4', '50.0', '–')
    """
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def print_row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
