"""Similarity of all experts of the store, clustered, and the graph of nearest neighbours (π-Tuning, fig. 1).

The similarity of two experts is the score of a measure of the store, around the mean of the shown experts. Rows and
columns are in the order of a hierarchical clustering (average linkage of 1 − similarity). In the graph an arrow leads
from each expert to the most similar one; similar experts are near each other, as far as two dimensions can show that
(Kamada and Kawai, 1989).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.core.plugins import Option
from pimerge.ranking.measure import MEASURES
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import COLOURS, GREY, MARKERS, new_figure, short_names, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

    from pimerge.embedding.store import Store

MEASURE = Option("measure", str, "A measure that compares experts by the store.")
MOST = 60


@dataclass(frozen=True, kw_only=True)
class GraphNode(FigureData):
    """An expert: its kind, the type of its task, the index of the most similar one, and its coordinates."""

    name: str
    kind: str
    task: str
    nearest: int | None
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class GraphData(FigureData):
    """The data of the plot.

    Attributes:
        experts: in the order of the clustering.
        similarity: similarity of each pair, None if the measure cannot compare them; 1 on the diagonal.
        merges: merges of the clustering as in scipy's ``linkage``: two clusters, their distance and their size.
    """

    measure: str
    experts: list[GraphNode]
    similarity: list[list[float | None]]
    merges: list[tuple[int, int, float, int]]


def open_embeddings(inputs: FigureInputs) -> Store:
    """Open the store of embeddings."""
    from pimerge.embedding.store import open_store

    return open_store(inputs.store)


def collect(store: Store, inputs: FigureInputs, *, measure: str) -> GraphData:
    """Compare all experts of a store, or the named ones."""
    import numpy as np

    from pimerge.reporting.figures._similarity import clustered, nearest_of, places_of, similarities

    chosen = MEASURES.load(measure)
    if not chosen.compares_embeddings:
        of_store = [each.name for each in MEASURES if each.compares_embeddings]
        raise PimergeError(
            f"'{chosen.name}' does not compare experts by the store alone", f"take {', '.join(of_store)}"
        )
    shown = _restricted(store, inputs.experts)
    names = list(shown.experts)
    found = similarities(shown, chosen, inputs.track, inputs.note)
    order, merges = clustered(found)
    found = found[np.ix_(order, order)]
    places = places_of(found)
    return GraphData(
        measure=chosen.name,
        experts=[
            GraphNode(
                name=names[index],
                kind=shown.experts[names[index]].kind,
                task=str(shown.experts[names[index]].task.get("type", "")),
                nearest=nearest_of(found[place], place),
                x=float(places[place][0]),
                y=float(places[place][1]),
            )
            for place, index in enumerate(order)
        ],
        similarity=[[None if np.isnan(value) else float(value) for value in row] for row in found],
        merges=merges,
    )


def draw(data: GraphData) -> Drawing:
    """Draw the matrix with its dendrogram on the left and the graph, with numbered experts, on the right."""
    count = len(data.experts)
    side = max(3.4, 0.17 * count + 1.6)
    figure = new_figure(2.15 * side + 2.4, side + 0.7)
    tree, matrix, graph = figure.subplots(1, 3, width_ratios=[0.16, 1.0, 1.0])
    _draw_tree(tree, data)
    _draw_matrix(matrix, data)
    _draw_graph(graph, data)
    return figure


def _restricted(store: Store, names: tuple[str, ...]) -> Store:
    """Return the store with all or some of its experts, without changing its files."""
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


def _draw_tree(axes: Axes, data: GraphData) -> None:
    import numpy as np
    from scipy.cluster.hierarchy import dendrogram

    count = len(data.experts)
    found = dendrogram(np.array(data.merges, float), no_plot=True)  # its leaves are numbered like the rows
    for leaves, distances in zip(found["icoord"], found["dcoord"], strict=True):
        axes.plot(distances, [(leaf - 5) / 10 for leaf in leaves], color="0.35", linewidth=0.8)
    axes.set_ylim(count - 0.5, -0.5)
    axes.invert_xaxis()
    axes.axis("off")


def _draw_matrix(axes: Axes, data: GraphData) -> None:
    import numpy as np

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


def _draw_graph(axes: Axes, data: GraphData) -> None:
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


FIGURE = Figure(
    name="graph",
    summary="Similarity of all experts of the store, clustered, and the graph of nearest neighbours (π-Tuning, "
    "fig. 1).",
    options={MEASURE: "fisher"},
    data=GraphData,
    inputs=("store", "experts"),
    open=open_embeddings,
    collect=collect,
    draw=draw,
)
