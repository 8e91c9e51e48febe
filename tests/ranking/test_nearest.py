"""Which experts of a store are compared, and that the shortlist of a large store gives the same first ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_file
from pimerge.embedding.embed_expert import projections_of, updates_of
from pimerge.embedding.random_projection import from_texts, project, to_text, update_embedding
from pimerge.embedding.store import DIAGONAL, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.ranking import nearest
from pimerge.ranking.measures import delta, fisher, fisher_factors, marginals, parameters
from pimerge.ranking.nearest import StoreComparison, by_projection, compare
from tests.support.experts import raw_expert, set_config
from tests.support.numerics import normal
from tests.support.tasks import write_json

D, R, LAYERS, FAMILIES, SIZE = 80, 2, 6, 5, 4
NAMES = [f"f{family}-{number}" for family in range(FAMILIES) for number in range(SIZE)]
TARGET = "f0-0"


def add(store: Store, name: str, seed: int, *, labels: str = "true", rank: int = R, noise: float = 0.5) -> None:
    """One expert of a family: what the family shares, and noise of its own."""
    family, own = 100 * int(name[1]), 1000 + 100 * seed

    def mixed(*shape: int, place: int) -> Tensor:
        return normal(*shape, seed=family + place) + noise * normal(*shape, seed=own + place)

    layers = [f"layers.{i}.proj" for i in range(LAYERS)]
    updates = {
        layer: (normal(rank, D, seed=i) + 0.1 * mixed(rank, D, place=i), mixed(D, rank, place=10 + i))
        for i, layer in enumerate(layers)
    }
    folder = raw_expert(store.path.parent / "pool" / name, updates)
    expert = open_expert(folder)
    marginal = {}
    for i, layer in enumerate(layers):
        seen = mixed(64, 20, place=20 + i)
        marginal |= {
            f"gradient.{layer}": seen @ seen.T,
            f"input.{layer}": mixed(D, place=30 + i).square(),
            f"output.{layer}": mixed(D, place=40 + i).square(),
        }
    marginal |= updates_of(expert)
    diagonal = {key: expert.tensor(key).square() for key in expert.file.entries}
    fields = {
        "path": store.path_of(expert),
        "sha256": expert.sha256,
        "config_sha256": sha256_file(folder / CONFIG),
        "task_sha256": "0",
        "kind": expert.kind,
        "base": expert.base.identity,
        "task": {},
        "settings": EmbedSettings(labels=labels),
        "examples": 1,
        "tokens": 1,
        "device": "cpu",
        "route": "rules",
        "sketches": projections_of(marginal),
    }
    store.add(name, fields, {DIAGONAL: diagonal, SECOND_MOMENTS: marginal})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five families of four experts in a store; not to be changed."""
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder / "embeddings.json")
    for seed, name in enumerate(NAMES):
        add(store, name, seed, noise=0.3 + 0.3 * int(name[3]))
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """A copy that may be changed."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Store(tmp_path / "embeddings.json")


def scores(compared: StoreComparison) -> dict[str, float]:
    assert compared.similarity is not None
    return dict(zip(compared.experts, compared.similarity.scores().tolist(), strict=True))


def first(compared: StoreComparison, count: int) -> list[str]:
    found = scores(compared)
    return sorted(found, key=lambda name: -found[name])[:count]


def test_a_small_store_is_compared_whole(template: Path) -> None:
    store = Store(template / "embeddings.json")
    compared = compare(store, TARGET, fisher.MEASURE)
    assert list(compared.experts) == NAMES[1:]
    assert compared.excluded == {}
    assert compared.shortlisted_from is None
    members = [store.view(name, store.open(name), moments=True) for name in NAMES]
    expected = fisher.similarity(members, len(NAMES) - 1, range(len(NAMES))).scores().tolist()
    assert list(scores(compared).values()) == pytest.approx(expected, abs=1e-12)
    assert set(first(compared, 3)) == {"f0-1", "f0-2", "f0-3"}


@pytest.mark.parametrize("measure", [fisher, marginals, delta])
def test_the_shortlist_of_a_large_store_has_the_same_first_ones(
    template: Path, monkeypatch: pytest.MonkeyPatch, measure: ModuleType
) -> None:
    store = Store(template / "embeddings.json")
    exact = compare(store, TARGET, measure.MEASURE)
    monkeypatch.setattr(nearest, "SHORTLIST", 8)
    monkeypatch.setattr(nearest, "MEAN_OF", 10)
    listed = compare(store, TARGET, measure.MEASURE)
    assert len(listed.experts) == 8
    assert listed.shortlisted_from == len(NAMES) - 1
    assert set(first(listed, 3)) == set(first(exact, 3))
    # around the mean of all others, the order and nearly the scores are those of the whole store
    monkeypatch.setattr(nearest, "MEAN_OF", len(NAMES))
    around_all = compare(store, TARGET, measure.MEASURE)
    assert first(around_all, 3) == first(exact, 3)
    assert scores(around_all) == pytest.approx({name: scores(exact)[name] for name in around_all.experts}, abs=0.1)


def test_the_mean_of_a_large_store_is_that_of_a_sample_from_near_to_far(
    template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(template / "embeddings.json")
    monkeypatch.setattr(nearest, "SHORTLIST", 4)
    monkeypatch.setattr(nearest, "MEAN_OF", 6)
    compared = compare(store, TARGET, delta.MEASURE)
    names = [TARGET, *compared.experts]
    ordered = by_projection(store, TARGET, NAMES[1:])
    sample = [ordered[index] for index in (1, 4, 7, 11, 14, 17)]  # the middles of six equal parts of nineteen
    assert set(sample) - set(names)  # some of them are read for the mean alone
    vectors = {name: vector(store, name) for name in {*names, *sample}}
    total = np.sum([vectors[name] for name in sample], 0)
    mean = total / 6
    whole = (total @ total - sum(vectors[name] @ vectors[name] for name in sample)) / (6 * 5)  # without bias

    def product(first: str, second: str) -> float:
        a, b = vectors[first], vectors[second]
        return float(a @ b - a @ mean - b @ mean + whole)

    for name, score in scores(compared).items():
        expected = product(TARGET, name) / np.sqrt(product(TARGET, TARGET) * product(name, name))
        assert score == pytest.approx(expected, abs=1e-9)


def vector(store: Store, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """ΔW of every module, in one vector."""
    expert = store.open(name)
    parts = (expert.factors(module) for module in sorted(expert.modules))
    return np.concatenate([(p.scaling * p.B.double() @ p.A.double()).numpy().ravel() for p in parts])


def test_the_nearest_by_sketch_are_those_of_the_sketches_centred_cosines(template: Path) -> None:
    store = Store(template / "embeddings.json")
    expected = dict.fromkeys(NAMES[1:], 0.0)
    for part in ("gradients", "update"):
        rows = from_texts([store.experts[name].sketches[part] for name in NAMES]).astype(np.float64)
        rows -= rows.mean(0)
        for name, row in zip(NAMES[1:], rows[1:], strict=True):
            expected[name] += rows[0] @ row / np.linalg.norm(rows[0]) / np.linalg.norm(row)
    ordered = sorted(expected, key=lambda name: -expected[name])
    assert by_projection(store, TARGET, NAMES[1:]) == ordered


def test_sketches_are_those_of_the_two_parts_of_fisher(template: Path) -> None:
    store = Store(template / "embeddings.json")
    member = store.view(TARGET, store.open(TARGET), moments=True)
    unit = {}
    for name, seen in member.moments(f"gradient.{layer}" for layer in member.layers("gradient")).items():
        unit[name] = torch.from_numpy(seen / np.linalg.norm(seen))
    found = store.experts[TARGET].sketches
    updates = {f"update.{name}": update for name, update in update_embedding(member.expert).items()}
    assert found == {"gradients": to_text(project(unit)), "update": to_text(project(updates))}


def test_an_empty_sketch_is_near_nobody(store: Store) -> None:
    nothing = to_text(torch.zeros(512))
    for name in NAMES:
        store.experts[name].sketches = {"update": nothing}
    assert by_projection(store, TARGET, NAMES[1:]) == NAMES[1:]


def reembed(store: Store, name: str, **options: object) -> None:
    shutil.rmtree(store.path.parent / "pool" / name)
    add(store, name, NAMES.index(name), **options)  # type: ignore[arg-type]


def test_those_that_cannot_be_compared_say_why(store: Store, tmp_path: Path) -> None:
    reembed(store, "f1-0", rank=3)
    reembed(store, "f1-1", labels="sampled")
    set_config(tmp_path / "pool" / "f1-2", base_model_name_or_path="org/other")
    expert = open_expert(tmp_path / "pool" / "f1-2")
    document = json.loads(store.path.read_text())
    entry = document["experts"]["f1-2"]
    entry |= {"base": expert.base.identity, "config_sha256": sha256_file(tmp_path / "pool" / "f1-2" / CONFIG)}
    document["experts"]["f1-3"]["kind"] = "other"
    write_json(store.path, document)
    shutil.rmtree(tmp_path / "pool" / "f2-0")
    raw_expert(tmp_path / "pool" / "f2-1", {"layers.0.proj": (normal(R, D), normal(D, R))})
    store = Store(store.path)
    shared = {
        "f1-2": "its base is org/other, another model than the target's org/base",
        "f2-0": "is gone",
        "f2-1": "has changed since it was embedded",
    }
    kind = {"f1-3": "its kind is other, the target's lora"}
    labels = {"f1-1": "its Fisher has sampled labels, the target's true"}
    rank = {"f1-0": "its rank is 3, but the target has rank 2"}
    for measure, reasons in (
        (fisher, shared | labels),
        (marginals, shared | labels),
        (fisher_factors, shared | kind | labels | rank),
        (delta, shared | kind),
        (parameters, shared | kind | rank),
    ):
        compared = compare(store, TARGET, measure.MEASURE)
        assert compared.excluded.keys() == reasons.keys()
        assert compared.experts.keys() == set(NAMES[1:]) - reasons.keys()
        for name, reason in reasons.items():
            assert reason in compared.excluded[name]


def test_other_shapes_do_not_compare(store: Store, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "pool" / "f1-0")
    folder = raw_expert(tmp_path / "pool" / "f1-0", {"layers.0.proj": (normal(R, D + 1), normal(D, R))})
    entry = store.experts["f1-0"]
    entry.sha256, entry.config_sha256 = open_expert(folder).sha256, sha256_file(folder / CONFIG)
    assert compare(store, TARGET, delta.MEASURE).excluded == {"f1-0": "its modules have other shapes than the target's"}


@pytest.mark.parametrize("shortlist", [100, 8])
def test_a_sidecar_of_the_target_that_was_altered_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortlist: int
) -> None:
    monkeypatch.setattr(nearest, "SHORTLIST", shortlist)
    path = tmp_path / store.experts[TARGET].sidecars[SECOND_MOMENTS].file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(PimergeError, match="has changed"):
        compare(store, TARGET, fisher.MEASURE)


@pytest.mark.parametrize("part", ["adapter", "sidecar"])
def test_a_large_store_notices_what_was_altered(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(nearest, "SHORTLIST", 8)
    near = by_projection(store, TARGET, NAMES[1:])[0]
    adapter = tmp_path / "pool" / near / "adapter_model.safetensors"
    path = adapter if part == "adapter" else tmp_path / store.experts[near].sidecars[SECOND_MOMENTS].file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    reason = "has changed since it was embedded" if part == "adapter" else f"{path.name}' has changed"
    assert reason in compare(store, TARGET, fisher.MEASURE).excluded[near]


def test_a_target_alone_has_nobody_to_compare_with(store: Store) -> None:
    for name in NAMES[1:]:
        store.drop(name)
    assert compare(store, TARGET, fisher.MEASURE) == StoreComparison({}, None, {}, None)


def order_of(names: Sequence[str]) -> list[int]:
    return [NAMES.index(name) for name in names]


def test_the_order_is_that_of_the_names_whatever_the_threads_do(template: Path) -> None:
    compared = compare(Store(template / "embeddings.json"), "f2-1", delta.MEASURE)
    assert order_of(list(compared.experts)) == [i for i, name in enumerate(NAMES) if name != "f2-1"]
