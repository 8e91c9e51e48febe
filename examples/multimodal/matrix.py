"""Print the cross-modal task graph: the similarity of every pair of experts by a measure of the store.

    python examples/multimodal/matrix.py [--measure marginals] [--store embeddings.json]

An expert's name begins with its modality, v (vision), vl (vision-language) or l (language), and ends in -b
for a bottleneck.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from pimerge.cli.console import print_table
from pimerge.embedding.store import open_store
from pimerge.ranking.by_store import rank_by_store
from pimerge.ranking.measure import MEASURES
from pimerge.ranking.selection import SelectionRule

MODALITIES = {"v": "vision", "vl": "vision-language", "l": "language"}
LORA, BOTTLENECK = KINDS = ["LoRA", "bottleneck"]
UNCENTRED = "fisher-raw"  # the paper's measure; a measure centred on the pool's mean shows no centrality
Graph = dict[tuple[str, str], float]


def main() -> None:
    """Print the matrix and what it shows about the modalities."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--measure", default="marginals")
    parser.add_argument("--store", type=Path, default=Path("embeddings.json"))
    arguments = parser.parse_args()
    names, graph = task_graph(arguments.store, arguments.measure)
    width = max(map(len, names))
    print(f"Similarity by '{arguments.measure}' × 100\n")
    print(" " * (width + 4) + "".join(f"{number:4}" for number in range(1, len(names) + 1)))
    for number, row in enumerate(names, 1):
        cells = (f"{100 * graph[row, name]:4.0f}" if name != row else "   ·" for name in names)
        print(f"{number:3} {row:{width}}" + "".join(cells))
    print("\nMean between different tasks, by modality:")
    print_table(["", *MODALITIES.values()], by_modality(names, graph))
    print(f"\nMean to all other LoRA experts by '{UNCENTRED}', most central first:")
    print_table(["expert", "mean"], centrality(*task_graph(arguments.store, UNCENTRED)))
    twins = [name for name in names if sum(task_of(other) == task_of(name) for other in names) == len(KINDS)]
    found = [name for name in twins if task_of(nearest(names, graph, name)) == task_of(name)]
    print(f"\nFor {len(found)} of {len(twins)} experts the nearest of the other kind is the one of the same task.")


def task_graph(path: Path, measure: str) -> tuple[list[str], Graph]:
    """The experts, grouped by modality, and the similarity of each pair."""
    store = open_store(path)
    order = list(MODALITIES)
    names = sorted(store.experts, key=lambda name: (order.index(modality(name)), name))
    graph = {
        (name, candidate.name): candidate.score
        for name in names
        for candidate in rank_by_store(store, name, MEASURES.load(measure), SelectionRule(gate=False)).candidates
    }
    return names, graph


def modality(name: str) -> str:
    """The modality of an expert: v, vl or l."""
    return name.partition("-")[0]


def task_of(name: str) -> str:
    """The task of an expert of any kind."""
    return name.removesuffix("-b")


def kind_of(name: str) -> str:
    """The kind of an expert."""
    return BOTTLENECK if name.endswith("-b") else LORA


def by_modality(names: Sequence[str], graph: Graph) -> list[list[str]]:
    """Rows of the table of means between modalities."""

    def between(first: str, second: str) -> float:
        return mean_of(graph, names, lambda a, b: (modality(a), modality(b)) == (first, second))

    return [[MODALITIES[a], *(f"{between(a, b):.2f}" for b in MODALITIES)] for a in MODALITIES]


def centrality(names: Sequence[str], graph: Graph) -> list[list[str]]:
    """Rows of the table of LoRA experts: the mean similarity of each to the others."""
    pool = [name for name in names if kind_of(name) == LORA]
    means = {name: mean(graph[name, other] for other in pool if other != name) for name in pool}
    return [[name, f"{means[name]:.2f}"] for name in sorted(pool, key=lambda name: -means[name])]


def mean_of(graph: Graph, names: Sequence[str], which: Callable[[str, str], bool]) -> float:
    """The mean over pairs of different tasks."""
    return mean(graph[a, b] for a, b in product(names, names) if task_of(a) != task_of(b) and which(a, b))


def nearest(names: Sequence[str], graph: Graph, name: str) -> str:
    """The nearest expert of the other kind."""
    return max((other for other in names if kind_of(other) != kind_of(name)), key=lambda other: graph[name, other])


if __name__ == "__main__":
    main()
