"""An expert for a target that has none: at the pool's init, and trained from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pimerge.adapters.compatibility import check_expert, differing_form, init_cosine
from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import Base, find_base
from pimerge.core.errors import PimergeError
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.heads import set_head
from pimerge.models.injection import injected
from pimerge.models.loading import Bases, load_base
from pimerge.ranking.by_store import rank_by_store
from pimerge.ranking.measure import MEASURES
from pimerge.ranking.selection import SelectionRule
from pimerge.tasks.task import Task, open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.target_expert import NewTarget, initial_expert, train_expert
from tests.support.experts import KINDS, PROMPTS, MakeExpert
from tests.support.numerics import logits_of, relative_difference

BRIEFLY = TrainingOptions(epochs=2)
CPU = torch.device("cpu")


def new_target(pool: Sequence[Expert], task: Task, base: Base) -> NewTarget:
    return NewTarget(pool=pool, task=task, base=base, options=BRIEFLY)


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> list[Expert]:
    folder = tmp_path_factory.mktemp("pool")
    return [open_expert(make_expert(folder / name, bert_base, text_task, seed=i)) for i, name in enumerate("abc")]


@pytest.fixture
def base(bert_base: Path) -> Base:
    return find_base(str(bert_base), None, bert_base)


@pytest.fixture
def task(text_task: Path) -> Task:
    return open_task(text_task)


def test_at_the_init_A_is_the_pools_mean_B_is_zero_and_the_head_answers(
    pool: list[Expert], base: Base, task: Task
) -> None:
    stored = [load_file(expert.path / "adapter_model.safetensors") for expert in pool]
    with initial_expert(new_target(pool, task, base)) as expert:
        found = load_file(expert.path / "adapter_model.safetensors")
        assert expert.name == task.name
        assert expert.base.identity == base.identity
        assert differing_form(expert, pool[0]) == ""
        for key in [key for key in stored[0] if "lora_A" in key]:
            mean = (stored[0][key].double() + stored[1][key].double() + stored[2][key].double()) / 3
            assert relative_difference(found[key], mean) < 1e-6
        factors_B = [key for key in stored[0] if "lora_B" in key]
        assert len(factors_B) == 4
        assert not any(found[key].any() for key in factors_B)
        assert found.keys() == stored[0].keys()
        for other in pool:
            cosine, least = init_cosine(expert, other)
            assert cosine > least

        loaded = load_base(base, task, CPU, torch.float32)
        examples, _ = task.examples("train", loaded.processor, loaded.config, limit=8)
        batch = examples.batch(range(8))
        with torch.no_grad():
            inner = {name: value for name, value in batch.items() if name != "labels"}
            pooled = loaded.model.bert(**inner).pooler_output
        head = expert.head_tensors()
        with injected(expert, loaded) as model:
            answers = logits_of(model, batch)
        assert relative_difference(answers, pooled @ head["classifier.weight"].T + head["classifier.bias"]) < 1e-5
        assert answers.shape == (8, 2)
        assert check_expert(expert).labels == task.labels
        folder = expert.path
    assert not folder.exists()


def test_its_fisher_of_B_compares_with_the_pools_and_that_of_A_is_zero(
    pool: list[Expert], base: Base, task: Task, tmp_path: Path
) -> None:
    store = Store(tmp_path / "embeddings.json")
    bases = Bases(CPU, torch.float32)
    with initial_expert(new_target(pool, task, base)) as expert:
        for member in (*pool, expert):
            embed_expert(member, check_expert(member), store, EmbedSettings(max_examples=8), bases)
        diagonal = store.diagonal(expert.name)
        assert all(bool(value.any()) == ("lora_B" in key) for key, value in diagonal.items())
        ranking = rank_by_store(store, expert.name, MEASURES.load("fisher-factors"), SelectionRule(3, gate=False))
        assert len(ranking.selected) == 3


@pytest.mark.parametrize("config", [{"init_seed": 5}, {"r": 2}, {"target_modules": ["query"]}])
def test_a_pool_without_a_shared_init_says_so(
    pool: list[Expert],
    base: Base,
    task: Task,
    make_expert: MakeExpert,
    bert_base: Path,
    tmp_path: Path,
    config: dict[str, object],
) -> None:
    stranger = open_expert(make_expert(tmp_path / "stranger", bert_base, **config))
    with (
        pytest.raises(PimergeError, match="'stranger' and 'a' do not share an init") as caught,
        initial_expert(new_target([*pool, stranger], task, base)),
    ):
        pass
    assert "--measure combined" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_kind_without_updates_it_starts_where_that_changes_nothing_or_at_the_pools_mean(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, base: Base, task: Task, kind: str, tmp_path: Path
) -> None:
    folders = [make_expert(tmp_path / f"{n}", bert_base, text_task, kind=kind, seed=n) for n in range(2)]
    stored = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    loaded = load_base(base, task, CPU, torch.float32)
    batch = task.examples("train", loaded.processor, loaded.config, limit=4)[0].batch(range(4))
    with initial_expert(new_target([open_expert(folder) for folder in folders], task, base)) as expert:
        found = load_file(expert.path / "adapter_model.safetensors")
        assert found.keys() == stored[0].keys()
        if kind in PROMPTS:
            mean = (stored[0]["prompt_embeddings"] + stored[1]["prompt_embeddings"]) / 2
            torch.testing.assert_close(found["prompt_embeddings"], mean)
        else:
            set_head(loaded.model, expert.head_tensors())
            before = logits_of(loaded.model, batch)
            with injected(expert, loaded) as model:
                torch.testing.assert_close(logits_of(model, batch), before)
        assert init_cosine(expert, open_expert(folders[0]))[0] >= init_cosine(expert, open_expert(folders[0]))[1]
    train_expert(new_target([open_expert(folder) for folder in folders], task, base), tmp_path / "new")
    trained = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert any(not torch.equal(trained[key], found[key]) for key in expert.keys)


def test_a_trained_one_compares_with_the_pool_factor_by_factor(
    pool: list[Expert], base: Base, task: Task, tmp_path: Path
) -> None:
    train_expert(new_target(pool, task, base), tmp_path / "targets" / "new")
    expert = open_expert(tmp_path / "targets" / "new")
    moved = [expert.factors(name).B.norm() for name in expert.modules]
    assert all(norm > 0 for norm in moved)
    store = Store(tmp_path / "embeddings.json")
    bases = Bases(CPU, torch.float32)
    for member in (*pool, expert):
        embed_expert(member, check_expert(member), store, EmbedSettings(max_examples=8), bases)
    for measure in ("parameters", "fisher-factors"):
        ranking = rank_by_store(store, "new", MEASURES.load(measure), SelectionRule())
        assert ranking.not_comparable == []
        assert {candidate.name for candidate in ranking.candidates} == {"a", "b", "c"}
    with pytest.raises(PimergeError, match="--force"):
        train_expert(new_target(pool, task, base), tmp_path / "targets" / "new")
