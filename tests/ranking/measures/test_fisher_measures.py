"""The measures on what the store holds of the Fisher information, against NumPy on explicit vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.safetensors_file import open_tensors
from pimerge.embedding.embed_expert import updates_of
from pimerge.embedding.random_projection import update_embedding
from pimerge.embedding.store_view import StoreView
from pimerge.ranking.measures import fisher, fisher_factors, fisher_raw, marginals, task2vec
from tests.support.experts import MakeExpert, dense_deltas, edit_tensors
from tests.support.numerics import change_basis
from tests.support.samples import stored

Vector = NDArray[np.float64]
COUNT = 5


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path) -> list[StoreView]:
    """Experts of one form with biases in their factors."""
    folder = tmp_path_factory.mktemp("pool")
    experts = [open_expert(make_expert(folder / str(i), vit_base, seed=i, lora_bias=True)) for i in range(COUNT)]
    return [stored(folder / f"store{i}", expert, i) for i, expert in enumerate(experts)]


def all_of(tensors: Mapping[str, Tensor]) -> Vector:
    return np.concatenate([tensors[key].numpy().astype(np.float64).ravel() for key in sorted(tensors)])


def kept_deltas(expert: Expert) -> dict[str, Tensor]:
    """The dense updates as the store keeps those of small layers: whole, in float32."""
    return {name: delta.float() for name, delta in dense_deltas(expert).items()}


def read(member: StoreView, part: str, beginning: str = "", ending: str = "") -> dict[str, Tensor]:
    file = {"diagonal": member.diagonal, "marginals": member.second_moments}[part]
    assert file is not None
    return {key: file.read(key) for key in file.entries if key.startswith(beginning) and key.endswith(ending)}


def unit(tensors: Mapping[str, Tensor]) -> Vector:
    """Every tensor at norm 1, in one vector."""
    parts = [tensors[key].numpy().astype(np.float64).ravel() for key in sorted(tensors)]
    return np.concatenate([part / np.linalg.norm(part) for part in parts])


def unit_outer(member: StoreView) -> Vector:
    """The outer products E[g²] ⊗ E[x²] of every layer, each at norm 1, in one vector."""
    outputs, inputs = read(member, "marginals", "output."), read(member, "marginals", "input.")
    outer = {}
    for name in member.expert.modules:
        g, x = outputs[f"output.{name}"].double(), inputs[f"input.{name}"].double()
        outer[name] = torch.outer(g, x)
    return unit(outer)


def cosines(vectors: Sequence[Vector], candidates: int, pool: Sequence[int] = ()) -> list[float]:
    """Of the first with those after it, around the mean of the pool."""
    mean = sum(vectors[i] for i in pool) / len(pool) if len(pool) >= 3 else np.zeros_like(vectors[0])
    first, *others = [vector - mean for vector in vectors[: candidates + 1]]
    return [float(first @ other / np.sqrt((first @ first) * (other @ other))) for other in others]


POOLS = [(4, range(5)), (2, range(3)), (2, range(5)), (2, range(2, 5)), (1, range(2)), (4, [0, 2, 4])]
"""How many are candidates, and whose mean is taken."""


@pytest.mark.parametrize(("candidates", "centre"), POOLS)
def test_fisher_is_half_gradients_and_half_updates(
    pool: list[StoreView], candidates: int, centre: Sequence[int]
) -> None:
    members = pool[: max(candidates, *centre) + 1]
    gradients = cosines([unit(read(member, "marginals", "gradient.")) for member in members], candidates, centre)
    updates = cosines([all_of(kept_deltas(member.expert)) for member in members], candidates, centre)
    expected = [(g + d) / 2 for g, d in zip(gradients, updates, strict=True)]
    found = fisher.similarity(members, candidates, list(centre))
    assert found.scores().tolist() == pytest.approx(expected, abs=1e-9)
    half = sum(
        value for name, value in zip(found.tensors, found.contributions()[0], strict=True) if "gradients" in name
    )
    assert float(half) == pytest.approx(gradients[0] / 2, abs=1e-9)


@pytest.mark.parametrize(("candidates", "centre"), POOLS)
def test_marginals_are_the_cosines_of_outer_products(
    pool: list[StoreView], candidates: int, centre: Sequence[int]
) -> None:
    members = pool[: max(candidates, *centre) + 1]
    expected = cosines([unit_outer(member) for member in members], candidates, centre)
    assert marginals.similarity(members, candidates, list(centre)).scores().tolist() == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize(("candidates", "centre"), POOLS)
def test_fisher_factors_is_the_centred_cosine_of_unit_factors_B(
    pool: list[StoreView], candidates: int, centre: Sequence[int]
) -> None:
    members = pool[: max(candidates, *centre) + 1]
    factors = [unit(read(member, "diagonal", ending="lora_B.weight")) for member in members]
    expected = cosines(factors, candidates, centre)
    found = fisher_factors.similarity(members, candidates, list(centre))
    assert found.scores().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("measure", [fisher, fisher_factors, marginals])
def test_the_scale_of_a_members_information_does_not_matter(
    pool: list[StoreView], tmp_path: Path, measure: ModuleType
) -> None:
    louder = [pool[0], stored(tmp_path, pool[1].expert, 1, scale=1000), *pool[2:]]
    expected = measure.similarity(pool, 4, range(5)).scores().tolist()
    assert measure.similarity(louder, 4, range(5)).scores().tolist() == pytest.approx(expected, abs=1e-6)


def test_fisher_raw_is_the_cosine_of_everything(pool: list[StoreView]) -> None:
    expected = cosines([all_of(read(member, "diagonal")) for member in pool], 4)
    assert fisher_raw.similarity(pool, 4, range(5)).scores().tolist() == pytest.approx(expected, abs=1e-12)


def test_task2vec_is_the_mean_cosine_of_shares(pool: list[StoreView]) -> None:
    own, *others = [read(member, "diagonal") for member in pool]
    expected = []
    for other in others:
        shares = []
        for key in own:
            a, b = (tensor.numpy().astype(np.float64).ravel() for tensor in (own[key], other[key]))
            shares += cosines([a / (a + b + 1e-6), b / (a + b + 1e-6)], 1)
        expected.append(np.mean(shares))
    assert task2vec.similarity(pool, 4, range(5)).scores().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", [fisher, marginals])
def test_the_basis_of_the_factors_is_not_seen(
    pool: list[StoreView], make_expert: MakeExpert, vit_base: Path, tmp_path: Path, measure: ModuleType
) -> None:
    basis = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    turned = make_expert(tmp_path / "turned", vit_base, seed=1, lora_bias=True)
    edit_tensors(turned, lambda tensors: change_basis(tensors, basis))
    other = [pool[0], stored(tmp_path / "store", open_expert(turned), 1), *pool[2:]]
    expected = measure.similarity(pool, 4, range(5)).scores().tolist()
    assert measure.similarity(other, 4, range(5)).scores().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("measure", [fisher, marginals])
def test_experts_of_any_rank_init_and_modules_compare(
    pool: list[StoreView], make_expert: MakeExpert, vit_base: Path, tmp_path: Path, measure: ModuleType
) -> None:
    configs = {"a": {"r": 2, "init_seed": 7}, "b": {"target_modules": ["q_proj"]}, "c": {"target_modules": ["o_proj"]}}
    members = [pool[0]]
    for seed, (name, config) in enumerate(configs.items()):
        expert = open_expert(make_expert(tmp_path / name, vit_base, seed=seed, **config))
        members.append(stored(tmp_path / f"store-{name}", expert, seed))
    layers = sorted({name for member in members for name in member.expert.modules})

    def whole(tensors: Mapping[str, Tensor], size: int) -> Vector:
        """One vector with a place for every layer, whether the member has it or not."""
        flat = {name: value.double().numpy().ravel() for name, value in tensors.items()}
        return np.concatenate([flat.get(layer, np.zeros(size)) for layer in layers])

    if measure is fisher:
        gradients = [
            whole({name.removeprefix("gradient."): x for name, x in read(m, "marginals", "gradient.").items()}, 256)
            for m in members
        ]
        for row in gradients:
            for part in np.split(row, len(layers)):
                part /= np.linalg.norm(part) or 1.0
        updates = [whole(kept_deltas(member.expert), 256) for member in members]
        halves = [cosines(vectors, 3, range(4)) for vectors in (gradients, updates)]
        expected = [(g + d) / 2 for g, d in zip(*halves, strict=True)]
    else:
        outer = []
        for m in members:
            found = read(m, "marginals", "")
            outer.append(
                {name: torch.outer(found[f"output.{name}"], found[f"input.{name}"]) for name in m.expert.modules}
            )
        vectors = [whole({n: v.double() / v.double().norm() for n, v in each.items()}, 256) for each in outer]
        expected = cosines(vectors, 3, range(4))
    found = measure.similarity(members, 3, range(4)).scores().tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_experts_of_embedding_layers_alone_have_their_updates(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    members = []
    for seed in range(3):
        name = str(seed)
        folder = make_expert(tmp_path / name, bert_base, text_task, seed=seed, target_modules=["word_embeddings"])
        expert = open_expert(folder)
        save_file(updates_of(expert), tmp_path / f"{name}.safetensors")
        members.append(StoreView(expert, second_moments=open_tensors(tmp_path / f"{name}.safetensors")))
    expected = cosines([all_of(update_embedding(member.expert)) for member in members], 2, range(3))
    assert fisher.similarity(members, 2, range(3)).scores().tolist() == pytest.approx(expected, abs=1e-9)
    assert marginals.similarity(members, 2, range(3)).scores().tolist() == [0, 0]
