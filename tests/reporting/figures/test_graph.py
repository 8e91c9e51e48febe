"""The graph of a store: similarities, clusters, nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.embedding.store import DIAGONAL, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.ranking.measures import delta
from pimerge.ranking.nearest import compare
from pimerge.reporting.figure import FigureInputs
from pimerge.reporting.figures import graph
from pimerge.reporting.figures._similarity import clustered, nearest_of, places_of
from tests.support import looks
from tests.support.experts import raw_expert
from tests.support.numerics import normal
from tests.support.tasks import write_json

NAMES = ["f0-0", "f1-0", "f0-1", "f1-1", "f2-0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two families of two experts, and a loner; the updates of a family are alike."""
    store = Store(tmp_path_factory.mktemp("graph") / "embeddings.json")
    for seed, name in enumerate(NAMES):
        shared = 10 * int(name[1])
        B = normal(8, 2, seed=shared) + 0.3 * normal(8, 2, seed=100 + seed)
        folder = raw_expert(store.path.parent / "pool" / name, {"layers.0.proj": (normal(2, 8, seed=shared + 1), B)})
        write_json(folder / "task.json", {})
        expert = open_expert(folder)
        fields = {
            "path": store.path_of(expert),
            "sha256": expert.sha256,
            "config_sha256": "",
            "task_sha256": "",
            "kind": "lora",
            "base": "b",
            "task": {"type": "text-classification"},
            "settings": EmbedSettings(),
            "examples": 1,
            "tokens": 1,
            "device": "cpu",
            "route": "rules",
            "sketches": {},
        }
        from pimerge.adapters.expert_files import CONFIG
        from pimerge.core.files import sha256_file

        fields["config_sha256"] = sha256_file(expert.path / CONFIG)
        tensors = {key: expert.tensor(key).square() for key in expert.file.entries}
        store.add(name, fields, {DIAGONAL: tensors, SECOND_MOMENTS: {}})
    return store


def found_in(data: graph.GraphData, one: str, other: str) -> float | None:
    names = [node.name for node in data.experts]
    return data.similarity[names.index(one)][names.index(other)]


def test_similarities_are_those_of_the_measure(store: Store) -> None:
    data = graph.FIGURE.compute(store, measure="delta")
    for name in NAMES:
        compared = compare(store, name, delta.MEASURE)
        assert compared.similarity is not None
        for other, score in zip(compared.experts, compared.similarity.scores(), strict=True):
            assert found_in(data, name, other) == pytest.approx(score, abs=1e-9)


def test_experts_of_a_family_are_nearest_and_side_by_side(store: Store) -> None:
    data = graph.FIGURE.compute(store, measure="delta")
    names = [node.name for node in data.experts]
    for node in data.experts:
        if node.name != "f2-0":
            assert node.nearest is not None
            assert names[node.nearest] == node.name[:3] + str(1 - int(node.name[3]))
            assert abs(names.index(node.name) - node.nearest) == 1
    values = np.array(data.similarity, float)
    distances = (1 - values)[np.triu_indices(len(names), 1)]
    assert [merge[2] for merge in data.merges] == pytest.approx(sorted(linkage(distances, "average")[:, 2]))


def test_experts_that_are_named_are_shown_alone_and_the_store_stays(store: Store) -> None:
    data = graph.FIGURE.compute(store, FigureInputs(experts=("f0-0", "f1-0", "f2-0")), measure="delta")
    assert sorted(node.name for node in data.experts) == ["f0-0", "f1-0", "f2-0"]
    assert list(store.experts) == sorted(NAMES)


@pytest.mark.parametrize(
    ("experts", "measure", "expected"),
    [
        ((), "combined", "take .*delta"),
        ((), "fischer", "'fisher'"),
        (("f0-0",), "fisher", "the graph of 1 experts"),
        (("f0-0", "nobody"), "fisher", "'nobody'"),
    ],
)
def test_experts_and_measures_that_do_not_fit_are_refused(
    store: Store, experts: tuple[str, ...], measure: str, expected: str
) -> None:
    with pytest.raises(PimergeError, match=expected):
        graph.FIGURE.compute(store, FigureInputs(experts=experts), measure=measure)


@pytest.mark.parametrize("count", [2, 40])
def test_it_is_readable_for_any_number_of_experts(count: int) -> None:
    generator = np.random.default_rng(count)
    values = np.corrcoef(generator.normal(size=(count, 5)))
    if count > 3:
        values[0, 1] = values[1, 0] = np.nan
    order, merges = clustered(values)
    values = values[np.ix_(order, order)]
    places = places_of(values)
    data = graph.GraphData(
        measure="fisher",
        experts=[
            graph.GraphNode(
                name=name,
                kind="lora" if place % 2 else "prefix",
                task="seq2seq",
                nearest=nearest_of(values[place], place),
                x=places[place, 0],
                y=places[place, 1],
            )
            for place, name in enumerate(looks.names(count))
        ],
        similarity=[[None if np.isnan(value) else value for value in row] for row in values.tolist()],
        merges=merges,
    )
    looks.assert_good(graph.FIGURE, data, [f"{name.split()[0][:9]}" for name in looks.names(count)])
