"""Experts → embeddings: against the test's own loop over PEFT's model, and what is computed again and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.embedding import embed_expert as embedding
from pimerge.embedding.embed_expert import EmbedOptions, EmbedOutcome, embed_expert
from pimerge.embedding.random_projection import from_texts
from pimerge.embedding.store import DIAGONAL, GRAMS, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import relative_difference
from tests.support.tasks import write_json

LIMIT = 12
Embed = Callable[..., EmbedOutcome]


def embed_into(store: Store, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> EmbedOutcome:
    """Embed one expert with the settings among the options."""
    tokens, force = options.pop("batch_tokens", None), options.pop("force", False)
    grams = options.pop("grams", False)
    settings = EmbedSettings(**{"max_examples": LIMIT, **options})
    expert = open_expert(folder)
    bases = Bases(torch.device("cpu"), dtype)
    return embed_expert(expert, check_expert(expert), store, settings, bases, EmbedOptions(tokens, grams, force))


def own_fisher(folder: Path, base: Path, draw_seed: int | None = None) -> dict[str, Tensor]:
    """Keys of the adapter's file → mean squared gradient, one unpadded example at a time."""
    task = open_task(folder)
    model = PeftModel.from_pretrained(model_for(base), folder).eval()
    factors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    model.requires_grad_(False)
    for parameter in factors.values():
        parameter.requires_grad_(True)
    examples, labels = task.examples("train", task.type.load_processor(str(base), None), model.config, limit=LIMIT)
    uniform = None
    if draw_seed is not None:
        uniform = torch.rand(len(labels), generator=torch.Generator().manual_seed(draw_seed), dtype=torch.float64)
    sums = {name: torch.zeros_like(parameter) for name, parameter in factors.items()}
    for index, label in enumerate(labels):
        batch = examples.batch([index])
        del batch["labels"]
        log_p = model(**batch).logits[0].log_softmax(0)
        y = label if uniform is None else int((log_p.double().exp().cumsum(0) < uniform[index]).sum())
        for name, gradient in zip(factors, torch.autograd.grad(-log_p[y], list(factors.values())), strict=True):
            sums[name] += gradient**2
    return {name.replace(".default", ""): value / len(labels) for name, value in sums.items()}


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    bert_base: Path,
    parity_task: Path,
    text_task: Path,
) -> Path:
    """Two experts on images and one on texts; not to be changed."""
    folder = tmp_path_factory.mktemp("pool")
    make_expert(folder / "a", vit_base, parity_task, seed=1)
    make_expert(folder / "b", vit_base, parity_task, seed=2, lora_bias=True)
    make_expert(folder / "c", bert_base, text_task, seed=3)
    return folder


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("batch_tokens", [1, 40, None])
def test_an_embedding_is_the_loops_fisher_under_the_adapters_keys(
    pool: Path, vit_base: Path, bert_base: Path, tmp_path: Path, name: str, batch_tokens: int | None
) -> None:
    store = Store(tmp_path / "embeddings.json")
    outcome = embed_into(store, pool / name, batch_tokens=batch_tokens)
    reference = own_fisher(pool / name, bert_base if name == "c" else vit_base)
    found = store.diagonal(name)
    with safe_open(pool / name / "adapter_model.safetensors", "pt") as adapter:
        assert found.keys() == {key for key in adapter.keys() if "lora_" in key}  # noqa: SIM118
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert relative_difference(found[key], value) < 1e-4, key
    assert outcome.computed
    entry = store.experts[name]
    assert entry.examples == LIMIT
    assert entry.route == "rules"
    assert entry.norm == pytest.approx(sum(float(v.double().square().sum()) for v in reference.values()) ** 0.5, 1e-3)
    assert entry.trace == pytest.approx(sum(float(v.double().sum()) for v in reference.values()), 1e-3)


def test_the_summary_per_module_is_the_trace_of_its_factors(pool: Path, vit_base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, pool / "b")
    reference = own_fisher(pool / "b", vit_base)
    for module, trace in store.traces("b").items():
        parts = [float(value.sum()) for key, value in reference.items() if f".{module}.lora_" in key]
        assert len(parts) == 3  # A, B and the bias
        assert trace == pytest.approx(sum(parts), 1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_sampled_labels_are_drawn_by_each_examples_own_number(
    pool: Path, vit_base: Path, tmp_path: Path, batch_tokens: int
) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, pool / "a", labels="sampled", batch_tokens=batch_tokens)
    reference = own_fisher(pool / "a", vit_base, draw_seed=0)
    for key, value in store.diagonal("a").items():
        assert relative_difference(value, reference[key]) < 1e-4


def test_bfloat16_keeps_the_direction(pool: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        vectors = []
        for dtype in (torch.float32, torch.bfloat16):
            store = Store(tmp_path / f"{dtype}.json")
            embed_into(store, pool / name, dtype)
            assert store.experts[name].settings.dtype == str(dtype).removeprefix("torch.")
            vectors.append(torch.cat([value.flatten().float() for value in store.diagonal(name).values()]))
        assert torch.nn.functional.cosine_similarity(*vectors, 0) > 0.99


def test_an_expert_without_a_head_is_refused_whatever_was_embedded_before(
    make_expert: MakeExpert, vit_base: Path, parity_task: Path, tmp_path: Path
) -> None:
    headless = open_expert(make_expert(tmp_path / "headless", vit_base, parity_task, head=False))
    other = open_expert(make_expert(tmp_path / "other", vit_base, parity_task, seed=1))
    bases = Bases(torch.device("cpu"), torch.float32)
    store = Store(tmp_path / "embeddings.json")
    embed_expert(other, check_expert(other), store, EmbedSettings(max_examples=LIMIT), bases)
    with pytest.raises(PimergeError, match="'headless' has no head"):
        embed_expert(headless, check_expert(headless), store, EmbedSettings(max_examples=LIMIT), bases)
    assert list(store.experts) == ["other"]


@pytest.fixture
def expert(make_expert: MakeExpert, vit_base: Path, tmp_path: Path, parity_task: Path) -> Path:
    """An expert with a task of its own, to be changed."""
    shutil.copytree(parity_task, tmp_path / "task")
    return make_expert(tmp_path / "x", vit_base, tmp_path / "task")


def test_an_unchanged_expert_is_not_computed_again_but_by_force(
    expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert)
    before = (tmp_path / "embeddings.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "diagonal_fisher", None)  # to call it would be an error
        assert not embed_into(store, expert).computed
        assert not embed_into(Store(tmp_path / "embeddings.json"), expert).computed
    assert embed_into(store, expert, force=True).computed
    assert (tmp_path / "embeddings.json").read_bytes() == before


def change_adapter(expert: Path, make_expert: MakeExpert, base: Path) -> None:
    make_expert(expert, base, seed=7)


def change_config(expert: Path, make_expert: MakeExpert, base: Path) -> None:
    path = expert / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "lora_alpha": 3})


def change_labels(expert: Path, make_expert: MakeExpert, base: Path) -> None:
    path = expert / "task.json"
    write_json(path, {**json.loads(path.read_text()), "labels": ["EVEN", "ODD"]})


def change_data(expert: Path, make_expert: MakeExpert, base: Path) -> None:
    task = expert.parent / "task"
    shutil.copy(task / "test.parquet", task / "train.parquet")


@pytest.mark.parametrize("change", [change_adapter, change_config, change_labels, change_data])
def test_a_changed_expert_is_computed_again(
    expert: Path, vit_base: Path, make_expert: MakeExpert, tmp_path: Path, change: Callable[..., None]
) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert)
    change(expert, make_expert, vit_base)
    assert embed_into(store, expert).computed
    assert not embed_into(store, expert).computed


@pytest.mark.parametrize("setting", [{"seed": 1}, {"max_examples": 5}, {"labels": "sampled"}, {"shots": 2}])
def test_other_settings_are_computed_again(expert: Path, tmp_path: Path, setting: dict[str, object]) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert)
    assert embed_into(store, expert, **setting).computed
    assert not embed_into(store, expert, **setting).computed


@pytest.mark.parametrize("part", [DIAGONAL, SECOND_MOMENTS])
def test_a_sidecar_that_is_gone_or_altered_is_computed_again(expert: Path, tmp_path: Path, part: str) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert)
    sidecar = tmp_path / store.experts["x"].sidecars[part].file
    content = sidecar.read_bytes()
    for damage in (sidecar.unlink, lambda: sidecar.write_bytes(content[:-1] + b"!")):
        damage()
        assert embed_into(store, expert).computed
        assert sidecar.read_bytes() == content


@pytest.mark.parametrize("name", ["a", "c"])
def test_the_sketches_are_near_the_cosines_of_the_two_parts_of_fisher(pool: Path, tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, pool / name)
    file = store.second_moments_file(name)
    gradients = {key: file.read(key).double() for key in file.entries if key.startswith("gradient.")}
    unit = {key: value / value.norm() for key, value in gradients.items()}
    deltas = dense_deltas(open_expert(pool / name))
    for part, values in (("gradients", unit), ("update", deltas)):
        norm = float(np.linalg.norm(from_texts([store.experts[name].sketches[part]])))
        assert norm**2 == pytest.approx(sum(float(value.square().sum()) for value in values.values()), rel=0.3)


def test_the_same_pool_gives_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    contents = []
    for order in ("ab", "ba"):
        store = Store(tmp_path / "embeddings.json")
        for name in order:
            embed_into(store, pool / name)
        files = [tmp_path / "embeddings.json", *sorted((tmp_path / "embeddings").glob("*.safetensors"))]
        contents.append([file.read_bytes() for file in files])
        for file in files:
            file.unlink()
    assert contents[0] == contents[1]


@pytest.mark.parametrize("batch_tokens", [1, 40, None])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_grams_are_those_of_the_unpadded_examples(
    pool: Path, bert_base: Path, tmp_path: Path, batch_tokens: int | None, labels: str
) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, pool / "c", grams=True, batch_tokens=batch_tokens, labels=labels)
    task = open_task(pool / "c")
    model = PeftModel.from_pretrained(model_for(bert_base), pool / "c").eval()
    examples, _ = task.examples("train", task.type.load_processor(str(bert_base), None), model.config, limit=LIMIT)
    name, seen = "bert.encoder.layer.1.attention.self.query", []
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0][0].detach().double()))
    for index in range(LIMIT):
        batch = examples.batch([index])
        del batch["labels"]
        model(**batch)
    x = torch.cat(seen)
    found = store.grams("c")
    assert set(found.entries) == set(store.traces("c"))
    assert relative_difference(found.read(name), x.T @ x / len(x)) < 1e-5
    assert len(x) == store.experts["c"].tokens


def test_grams_are_added_to_what_has_none_and_then_stay(
    expert: Path, vit_base: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert)
    diagonal = store.experts["x"].sidecars[DIAGONAL]
    assert embed_into(store, expert, grams=True).computed
    assert store.experts["x"].sidecars[DIAGONAL] == diagonal
    sidecar = tmp_path / store.experts["x"].sidecars[GRAMS].file
    content = sidecar.read_bytes()
    assert not embed_into(store, expert, grams=True).computed
    assert not embed_into(store, expert).computed
    assert embed_into(store, expert, force=True).computed
    assert sidecar.read_bytes() == content
    make_expert(expert, vit_base, seed=7)  # no Gram matrices of another expert are left
    assert embed_into(store, expert).computed
    assert not sidecar.exists()
    assert len(store.grams("x").entries) == 4


@pytest.mark.parametrize("again", [True, False])
def test_grams_that_are_gone_or_altered_are_computed_again(expert: Path, tmp_path: Path, again: bool) -> None:
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, expert, grams=True)
    sidecar = tmp_path / store.experts["x"].sidecars[GRAMS].file
    content = sidecar.read_bytes()
    for damage in (sidecar.unlink, lambda: sidecar.write_bytes(content[:-1] + b"!")):
        damage()
        assert embed_into(store, expert, grams=again).computed
        assert sidecar.read_bytes() == content


def test_an_expert_without_linear_layers_has_no_grams_and_is_not_computed_twice(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "w", bert_base, text_task, target_modules=["word_embeddings"])
    store = Store(tmp_path / "embeddings.json")
    embed_into(store, folder, grams=True)
    assert not store.grams("w").entries
    assert not embed_into(store, folder, grams=True).computed
