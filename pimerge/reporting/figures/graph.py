"""Similarity of all experts of the store, clustered, and the graph of who is nearest to whom (π-Tuning, fig. 1).

The similarity of two experts is a measure of the store's, around the mean of the experts that are shown. Rows and
columns are in the order of a hierarchical clustering (average linkage of 1 − similarity). In the graph an arrow leads
from each expert to the one that is most similar to it; nearness on the plane is similarity as far as two dimensions
can show it (Kamada and Kawai, 1989).
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from pimerge.core import plugins
from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.reporting.figures import Options
from pimerge.reporting.figures._canvas import COLOURS, GREY, MARKERS, new_figure, short_names, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from pimerge.embedding.store import Store

    Array = NDArray[np.float64]

NEEDS = "store"
OPTIONS = ("measure", "experts")
MOST = 60
LEAST_GAP = 0.7  # between two of n experts, of a square of side 1, times √n
OF_STORE = ("fisher", "marginals", "experts")


class Node(BaseModel):
    """An expert: its kind, the type of its task, the place of the most similar one, and where it is drawn."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    task: str
    nearest: int | None
    x: FiniteFloat
    y: FiniteFloat


class Data(BaseModel):
    """What the plot shows.

    Attributes:
        experts: in the order of the clustering.
        similarity: between each two of them, None where the measure cannot compare them; 1 with themselves.
        merges: of the clustering, as scipy's ``linkage`` has them: two clusters, their distance, their size.
    """

    model_config = ConfigDict(extra="forbid")

    figure: Literal["graph"] = "graph"
    measure: str
    experts: list[Node]
    similarity: list[list[FiniteFloat | None]]
    merges: list[tuple[int, int, FiniteFloat, int]]


def collect(store: Store, options: Options) -> Data:
    """Compare all experts of a store, or those that are named.

    Raises:
        PimergeError: if the measure is none of the store's, or the experts are fewer than two or too many.
    """
    measure = options.measure
    of_store = [name for name in plugins.summaries("pimerge.ranking.measures") if _needs(name) in OF_STORE]
    if measure in plugins.summaries("pimerge.ranking.measures") and measure not in of_store:
        raise PimergeError(f"'{measure}' does not compare experts by the store alone", f"take {', '.join(of_store)}")
    shown = _restricted(store, options.experts)
    names = list(shown.experts)
    found = _similarities(shown, plugins.load("pimerge.ranking.measures", measure), options)
    order, merges = _clustered(found)
    found = found[np.ix_(order, order)]
    places = _places(found)
    return Data(
        measure=measure,
        experts=[
            Node(
                name=names[index],
                kind=shown.experts[names[index]].kind,
                task=str(shown.experts[names[index]].task.get("type", "")),
                nearest=_nearest(found[place], place),
                x=float(places[place][0]),
                y=float(places[place][1]),
            )
            for place, index in enumerate(order)
        ],
        similarity=[[None if np.isnan(value) else float(value) for value in row] for row in found],
        merges=merges,
    )


def draw(data: Data) -> Figure:
    """The matrix with its dendrogram on the left, the graph on the right; numbers say which expert is which."""
    count = len(data.experts)
    side = max(3.4, 0.17 * count + 1.6)
    figure = new_figure(2.15 * side + 2.4, side + 0.7)
    tree, matrix, graph = figure.subplots(1, 3, width_ratios=[0.16, 1.0, 1.0])
    _draw_tree(tree, data)
    _draw_matrix(matrix, data)
    _draw_graph(graph, data)
    return figure


def _needs(measure: str) -> str:
    needs: str = plugins.load("pimerge.ranking.measures", measure).NEEDS
    return needs


def _restricted(store: Store, names: tuple[str, ...]) -> Store:
    """The store with some of its experts alone, or all of them; its files stay as they are."""
    chosen = list(store.experts)
    if names:
        problems = Problems()
        found = {name: store.find(name) for name in names}
        for name in (name for name, known in found.items() if known is None):
            problems.add(f"there is no expert '{name}' in '{store.path}'", nearest(name, chosen))
        problems.raise_any("some experts are not in the store")
        chosen = sorted({known for known in found.values() if known is not None})
    if not 1 < len(chosen) <= MOST:
        raise PimergeError(
            f"the graph of {len(chosen)} experts of '{store.path}' was asked for",
            f"name 2 to {MOST} of them: pimerge plot graph NAME NAME …"
            if len(chosen) > 1 or len(store.experts) > 1
            else "add experts first: pimerge embed ./experts",
        )
    shown = copy(store)
    shown.document = store.document.model_copy(update={"experts": {name: store.experts[name] for name in chosen}})
    return shown


def _similarities(store: Store, measure: Any, options: Options) -> Array:
    """(n × n) similarities, symmetric, NaN where the measure cannot compare two experts."""
    from pimerge.ranking.nearest import compare

    names = list(store.experts)
    found: Array = np.full((len(names), len(names)), np.nan)
    reasons: dict[str, str] = {}
    with options.track("comparing", len(names), "experts") as advance:
        for row, name in enumerate(names):
            try:
                compared = compare(store, name, measure)
            except PimergeError as error:  # it has changed, or is of a kind that the measure does not know
                reasons[name] = error.problems[0].message
                advance()
                continue
            if compared.similarity is not None:
                columns = [names.index(other) for other in compared.experts]
                found[row, columns] = compared.similarity.scores()
            advance()
    for name, reason in reasons.items():
        options.note(f"{name} is compared with nobody: {reason}")
    with np.errstate(invalid="ignore"):
        found = (found + found.T) / 2
    if np.isnan(found).all():
        raise PimergeError(
            f"no two of the {len(names)} experts can be compared", next(iter(reasons.values()), "see pimerge inspect")
        )
    np.fill_diagonal(found, 1.0)
    return found


def _clustered(similarity: Array) -> tuple[list[int], list[tuple[int, int, float, int]]]:
    """The order of the leaves, and the merges with the leaves numbered in that order."""
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
    """(n × n) 1 − similarity; two experts that cannot be compared are as far apart as any are."""
    distances = 1 - similarity
    filled: Array = np.where(np.isnan(distances), np.nanmax(distances), distances)
    np.fill_diagonal(filled, 0.0)
    return filled


def _places(similarity: Array) -> Array:
    """(n × 2) places in [0, 1]²: near each other where experts are similar, none over another."""
    import networkx as nx

    count = len(similarity)
    distances = np.maximum(_distances(similarity), 0.05)
    whole = nx.complete_graph(count)
    lengths = {i: {j: float(distances[i, j]) for j in range(count)} for i in range(count)}
    found = nx.kamada_kawai_layout(whole, dist=lengths)
    places = np.array([found[index] for index in range(count)])
    least = LEAST_GAP / np.sqrt(count)
    for _ in range(200):  # push apart those that would cover each other
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


def _nearest(row: Array, own: int) -> int | None:
    others = np.array(row)
    others[own] = np.nan
    return None if np.isnan(others).all() else int(np.nanargmax(others))


def _draw_tree(axes: Axes, data: Data) -> None:
    from scipy.cluster.hierarchy import dendrogram

    count = len(data.experts)
    found = dendrogram(np.array(data.merges, float), no_plot=True)  # its leaves are numbered as the rows are
    for leaves, distances in zip(found["icoord"], found["dcoord"], strict=True):
        axes.plot(distances, [(leaf - 5) / 10 for leaf in leaves], color="0.35", linewidth=0.8)
    axes.set_ylim(count - 0.5, -0.5)
    axes.invert_xaxis()
    axes.axis("off")


def _draw_matrix(axes: Axes, data: Data) -> None:
    count = len(data.experts)
    values = np.array([[np.nan if v is None else v for v in row] for row in data.similarity], float)
    np.fill_diagonal(values, np.nan)
    image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="equal")
    axes.set_facecolor("0.85")
    size = 8 if count <= 25 else 7
    names = short_names([node.name for node in data.experts])
    labels = [f"{name}  {number}" for number, name in enumerate(names, 1)]
    axes.set_yticks(range(count), labels, fontsize=size)
    axes.set_xticks(range(count), [str(number) for number in range(1, count + 1)], fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label=f"similarity ({data.measure})")
    title(axes, "Similarity, clustered")


def _draw_graph(axes: Axes, data: Data) -> None:
    from matplotlib.patches import FancyArrowPatch

    nodes = data.experts
    kinds = len({node.kind for node in nodes}) > 1
    what = [node.kind if kinds else node.task or "no task" for node in nodes]
    groups = sorted(set(what))
    radius = 10 if len(nodes) <= 25 else 8.5
    for node in nodes:
        if node.nearest is None:
            continue
        other = nodes[node.nearest]
        axes.add_patch(
            FancyArrowPatch(
                (node.x, node.y),
                (other.x, other.y),
                arrowstyle="-|>",
                mutation_scale=9,
                connectionstyle="arc3,rad=0.18",
                shrinkA=radius - 1,
                shrinkB=radius - 1,
                color="0.45",
                linewidth=1.0,
            )
        )
    for place, group in enumerate(groups):
        members = [node for node, own in zip(nodes, what, strict=True) if own == group]
        axes.plot(
            [node.x for node in members],
            [node.y for node in members],
            linestyle="none",
            marker=MARKERS[place % len(MARKERS)],
            markersize=1.6 * radius,
            markerfacecolor="white",
            markeredgecolor=COLOURS[place % len(COLOURS)],
            markeredgewidth=1.8,
            label=group,
        )
    for number, node in enumerate(nodes, 1):
        axes.annotate(str(number), (node.x, node.y), ha="center", va="center", fontsize=radius - 2)
    axes.set_xlim(-0.12, 1.12)
    axes.set_ylim(-0.12, 1.12)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GREY)
    axes.spines[:].set_visible(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, markerscale=0.5)
    title(axes, "Each expert's arrow leads to its nearest")
