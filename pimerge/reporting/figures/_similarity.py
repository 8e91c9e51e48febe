"""Similarities of the experts of a store, their clustering, and a layout in two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pimerge.core.progress import Note, Track
    from pimerge.embedding.store import Store
    from pimerge.ranking.measure import Measure

    Array = NDArray[np.float64]

LEAST_GAP = 0.7  # smallest distance of two of n experts in a square of side 1, times √n


def similarities(store: Store, measure: Measure, track: Track, note: Note) -> Array:
    """Compute symmetric similarities (n × n), NaN if the measure cannot compare two experts."""
    from pimerge.ranking.nearest import compare

    names = list(store.experts)
    found: Array = np.full((len(names), len(names)), np.nan)
    reasons: dict[str, str] = {}
    with track("comparing", len(names), "experts") as advance:
        for row, name in enumerate(names):
            try:
                compared = compare(store, name, measure)
            except PimergeError as error:  # it has changed, or the measure does not know its kind
                error.raise_if_disk_fails()
                reasons[name] = error.problems[0].message
                advance()
                continue
            if compared.similarity is not None:
                columns = [names.index(other) for other in compared.experts]
                found[row, columns] = compared.similarity.scores()
            advance()
    for name, reason in reasons.items():
        note(f"{name} cannot be compared with any other expert: {reason}")
    with np.errstate(invalid="ignore"):
        found = (found + found.T) / 2
    if np.isnan(found).all():
        raise PimergeError(
            f"no two of the {len(names)} experts can be compared", next(iter(reasons.values()), "see pimerge inspect")
        )
    np.fill_diagonal(found, 1.0)
    return found


def clustered(similarity: Array) -> tuple[list[int], list[tuple[int, int, float, int]]]:
    """Return the order of the leaves, and the merges with the leaves numbered in that order."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    merges = linkage(squareform(_distances(similarity), checks=False), "average", optimal_ordering=True)
    order = [int(leaf) for leaf in leaves_list(merges)]
    moved = {leaf: place for place, leaf in enumerate(order)}
    found = [
        (moved.get(int(one), int(one)), moved.get(int(other), int(other)), max(0.0, float(distance)), int(size))
        for one, other, distance, size in merges
    ]
    return order, found


def _distances(similarity: Array) -> Array:
    """Return (n × n) 1 − similarity, with the largest distance for experts that cannot be compared."""
    distances = 1 - similarity
    filled: Array = np.where(np.isnan(distances), np.nanmax(distances), distances)
    np.fill_diagonal(filled, 0.0)
    return filled


def places_of(similarity: Array) -> Array:
    """Return (n × 2) places in [0, 1]² without overlaps, where similar experts are near each other."""
    import networkx as nx

    count = len(similarity)
    distances = np.maximum(_distances(similarity), 0.05)
    whole = nx.complete_graph(count)
    lengths = {i: {j: float(distances[i, j]) for j in range(count)} for i in range(count)}
    found = nx.kamada_kawai_layout(whole, dist=lengths)
    places = np.array([found[index] for index in range(count)])
    least = LEAST_GAP / np.sqrt(count)
    for _ in range(200):  # push overlapping experts apart
        low, high = places.min(0), places.max(0)
        places = (places - low) / np.maximum(high - low, 1e-9)
        apart = places[:, None] - places[None]
        lengths_now = np.sqrt((apart**2).sum(-1)) + np.eye(count)
        short = np.maximum(0.0, least - lengths_now) * (1 - np.eye(count))
        if not (short > 1e-3).any():
            break
        places = places + (apart / lengths_now[..., None] * short[..., None]).sum(1) / 2
    rounded: Array = places.round(6)
    return rounded


def nearest_of(row: Array, own: int) -> int | None:
    others = np.array(row)
    others[own] = np.nan
    return None if np.isnan(others).all() else int(np.nanargmax(others))
