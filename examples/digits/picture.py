"""Draw pool.png: what each expert was trained on, and how much it is expected to help the target X.

    python examples/digits/picture.py RANKING_JSON [OUTPUT]

The ranking is by the target's examples, as ``pimerge rank --target X -k 2`` writes it.

Needs ``pip install 'pimerge[plots]'``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from pimerge.adapters.ranking_document import read_ranking
from pimerge.tasks.task import open_task

SCANS = 7


def main() -> None:
    """Draw the picture."""
    source = Path(sys.argv[1])
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("pool.png")
    ranking = read_ranking(source)
    rows = [(each.name, each.path) for each in (ranking.target, *ranking.candidates)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), width_ratios=(1, 1.2), layout="constrained")
    left.imshow(np.concatenate([strip(source.parent / path) for _, path in rows]), cmap="gray", aspect="equal")
    left.set_yticks([10 * place + 4.5 for place in range(len(rows))], [name for name, _ in rows])
    left.set_xticks([])
    left.set_title("trained on", fontsize=10)
    gains = np.array([(each.gain, each.gain_low, each.gain_high) for each in ranking.candidates], float) * 100
    colours = ["#0072b2" if candidate.name in ranking.selected else "#bbbbbb" for candidate in ranking.candidates]
    errors = (gains[:, 0] - gains[:, 1], gains[:, 2] - gains[:, 0])
    right.barh(range(1, len(rows)), gains[:, 0], color=colours, xerr=errors, error_kw={"linewidth": 0.8})
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set_yticks([])
    right.text(0.5, 0, "the target: five labels per digit", va="center", fontsize=9)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_title(f"expected gain for {ranking.target.name}, points; blue: selected", fontsize=10)
    for side in ("top", "right", "left"):
        right.spines[side].set_visible(False)
        left.spines[side].set_visible(False)
    left.spines["bottom"].set_visible(False)
    right.tick_params(left=False)
    left.tick_params(left=False)
    figure.savefig(output, dpi=130, bbox_inches="tight")


def strip(expert: Path) -> Any:
    """Some scans that an expert was trained on, side by side on grey, 10 pixels high."""
    rows, _ = open_task(expert).rows("train")
    canvas = np.full((10, 10 * SCANS), 160, dtype=np.uint8)
    for place in range(SCANS):
        canvas[1:9, 10 * place + 1 : 10 * place + 9] = np.asarray(rows[place]["image"].convert("L"))
    return canvas


if __name__ == "__main__":
    main()
