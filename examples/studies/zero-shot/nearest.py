"""Print the accuracy of a ranking's nearest and farthest experts without training, as Markdown.

    python examples/studies/zero-shot/nearest.py TARGET.scores.json ...

``TARGET.ranking.json`` is beside each, and the scores contain ``bare``, the bare base with another task's head.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

BARE = "bare"


def main() -> None:
    """Print the table."""
    print("| target | its own expert | nearest | best other | mean of the others | farthest | bare base |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in map(Path, sys.argv[1:]):
        target = path.name.removesuffix(".scores.json")
        scores = {row["name"]: row["metrics"]["accuracy"] for row in read(path)["scores"]}
        ranked = [each["name"] for each in read(path.with_name(f"{target}.ranking.json"))["candidates"]]
        best = max(ranked, key=lambda name: scores[name]["value"])
        mean = statistics.fmean(scores[name]["value"] for name in ranked)
        named = [f"{name} {shown(scores[name])}" for name in (ranked[0], best)]
        last = f"{ranked[-1]} {shown(scores[ranked[-1]])}"
        cells = [target, shown(scores[target]), *named, f"{100 * mean:.1f}", last, shown(scores[BARE])]
        print("|", " | ".join(cells), "|")


def read(path: Path) -> Any:
    """A JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def shown(score: dict[str, float]) -> str:
    """An accuracy in per cent, with its interval.

    >>> shown({"value": 0.5, "low": 0.4, "high": 0.6})
    '50.0 [40.0, 60.0]'
    """
    return f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


if __name__ == "__main__":
    main()
