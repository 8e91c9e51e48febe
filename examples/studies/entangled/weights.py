"""Print the weight of each expert in tuned ones, and the share of the target's classes that it saw, as Markdown.

    python examples/studies/entangled/weights.py TUNED-SEED ...

A folder's name ends in its seed. A cell is the mean weight over modules and seeds ± the sd over seeds, and the share.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def main() -> None:
    """Print the table, and how often the largest weight is at the right expert."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    right = []
    for folder in map(Path, sys.argv[1:]):
        document = json.loads((folder / "coefficients.json").read_text(encoding="utf-8"))
        target = labels_of(folder)
        experts = [folder / path for path in document["experts"]]
        shares = [len(target & labels_of(expert)) / len(target) for expert in experts]
        weights = [statistics.fmean(column) for column in zip(*document["weights"].values(), strict=True)]
        right.append(shares[weights.index(max(weights))] == max(shares))
        row = found.setdefault(folder.name.rpartition("-")[0], {})
        for expert, weight, share in zip(experts, weights, shares, strict=True):
            row.setdefault(expert.name, []).append((weight, share))
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    print("| target |", " | ".join(names), "|")
    print("| --- |", " | ".join("---" for _ in names), "|")
    for target, row in found.items():
        print(f"| {target} |", " | ".join(cell(row[name]) if name in row else "–" for name in names), "|")
    pairs = [pair for row in found.values() for values in row.values() for pair in values]
    print(f"\nThe largest weight is at an expert that saw most of the classes in {sum(right)} of {len(right)} runs.")
    all_weights, all_shares = zip(*pairs, strict=True)
    if len(set(all_weights)) > 1 and len(set(all_shares)) > 1:
        print(f"Correlation of weight and share of classes: {statistics.correlation(all_weights, all_shares):.2f}")


def labels_of(folder: Path) -> set[str]:
    """The classes of a task."""
    return set(json.loads((folder / "task.json").read_text(encoding="utf-8"))["labels"])


def cell(values: list[tuple[float, float]]) -> str:
    """Mean weight ± sd, and the share of classes.

    >>> cell([(0.4, 0.5), (0.6, 0.5)])
    '0.50 ± 0.14 (50 %)'
    """
    weights = [weight for weight, _ in values]
    spread = f" ± {statistics.stdev(weights):.2f}" if len(weights) > 1 else ""
    return f"{statistics.fmean(weights):.2f}{spread} ({values[0][1]:.0%})".replace("%", " %")


if __name__ == "__main__":
    main()
