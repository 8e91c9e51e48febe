"""Loading a base, plugging an expert in and taking it out, against transformers and PEFT themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from pimerge.adapters.base_fit import check_fits, check_fits_on_disk
from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.models.heads import head_of_size, initialise_head, set_head
from pimerge.models.injection import injected, injected_sum
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import Bases, load_base, resolve_device, resolve_dtype
from pimerge.tasks.task import open_task
from tests.support.bases import model_for, save_tokenizer
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import logits_of, relative_difference
from tests.support.tasks import write_json

CPU = torch.device("cpu")


def load(base: Path, task: Path, dtype: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(find_base(str(base), None, base), open_task(task), CPU, dtype)


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def test_a_base_is_frozen_in_eval_mode_and_its_head_is_what_the_checkpoint_lacks(
    vit_base: Path, parity_task: Path
) -> None:
    loaded = load(vit_base, parity_task)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.head == ("classifier",)
    assert loaded.head_tensors().keys() == {"classifier.weight", "classifier.bias"}
    assert not loaded.has_own_head
    assert loaded.config.id2label == {0: "even", 1: "odd"}


def test_the_head_of_a_bert_holds_the_pooler_only_if_the_checkpoint_lacks_it(
    bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    assert load(bert_base, text_task).head == ("classifier",)
    bare = tmp_path / "bert"
    transformers.BertModel.from_pretrained(bert_base, add_pooling_layer=False).save_pretrained(bare)
    transformers.AutoTokenizer.from_pretrained(bert_base).save_pretrained(bare)
    assert set(load(bare, text_task).head) == {"classifier", "bert.pooler.dense"}


def test_a_fresh_head_is_the_same_for_the_same_seed(vit_base: Path, parity_task: Path) -> None:
    base, task = find_base(str(vit_base), None, vit_base), open_task(parity_task)
    first, again, other = (load_base(base, task, CPU, torch.float32, seed).head_tensors() for seed in (1, 1, 2))
    assert torch.equal(first["classifier.weight"], again["classifier.weight"])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(("names", "own"), [(["even", "odd"], True), (["odd", "even"], False), (["a", "b"], False)])
def test_a_base_has_its_own_head_if_its_labels_are_the_tasks(
    vit_base: Path, parity_task: Path, tmp_path: Path, names: list[str], own: bool
) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(vit_base, id2label=dict(enumerate(names)))
    model.save_pretrained(tmp_path / "base")
    transformers.AutoImageProcessor.from_pretrained(vit_base).save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base", parity_task)
    assert loaded.has_own_head == own
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)


def test_a_base_with_a_head_of_another_size_gets_a_fresh_one(vit_base: Path, parity_task: Path, tmp_path: Path) -> None:
    transformers.AutoModelForImageClassification.from_pretrained(vit_base, num_labels=5).save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(vit_base).save_pretrained(tmp_path)
    loaded = load(tmp_path, parity_task)
    assert loaded.head_tensors()["classifier.weight"].shape == (2, 16)
    assert not loaded.has_own_head


def test_a_base_of_another_sort_names_itself_and_the_task(bert_base: Path, parity_task: Path) -> None:
    with pytest.raises(PimergeError, match=r"bert'.* cannot be loaded for image-classification"):
        load(bert_base, parity_task)


def test_plugging_in_is_pefts_model_and_taking_out_leaves_the_base_as_it_was(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    for seed in (1, 2):
        folder = make_expert(tmp_path / str(seed), vit_base, parity_task, seed=seed)
        expected = PeftModel.from_pretrained(model_for(vit_base), folder).eval()
        with injected(open_expert(folder), loaded) as model:
            assert torch.equal(logits_of(model, pixels()), logits_of(expected, pixels()))
        after = loaded.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_expert_comes_out_even_after_an_error(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    expected = logits_of(loaded.model, pixels())
    expert = open_expert(make_expert(tmp_path / "a", vit_base))
    with pytest.raises(KeyboardInterrupt), injected(expert, loaded):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(loaded.model, pixels()), expected)


def state_of(loaded: LoadedBase) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def require_same(loaded: LoadedBase, before: dict[str, torch.Tensor]) -> None:
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_sum_of_one_is_pefts_model_under_the_bases_own_head(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    folder = make_expert(tmp_path / "a", vit_base, parity_task, use_rslora=True)
    expected = PeftModel.from_pretrained(model_for(vit_base), folder).eval()
    set_head(expected, loaded.head_tensors())
    with injected_sum([open_expert(folder)], [1.0], loaded) as model:
        assert torch.equal(logits_of(model, pixels()), logits_of(expected, pixels()))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_a_sum_of_several_is_the_dense_sum_and_the_base_comes_back(
    request: pytest.FixtureRequest, kind: str, make_expert: MakeExpert, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_base")
    task: Path = request.getfixturevalue("parity_task" if kind == "vit" else "text_task")
    loaded = load(base, task)
    before = state_of(loaded)
    modules = {"vit": ["k_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    experts = [
        open_expert(make_expert(tmp_path / "a", base, task)),
        open_expert(make_expert(tmp_path / "b", base, task, seed=1, r=2, lora_alpha=3, head=False)).with_strength(0.25),
        open_expert(make_expert(tmp_path / "c", base, task, seed=2, r=3, target_modules=modules)).with_strength(0.5),
    ]
    weights = [0.5, 1.5, -1.0]
    dense = load(base, task).model
    with torch.no_grad():
        for expert, weight in zip(experts, weights, strict=True):
            for name, delta in dense_deltas(expert).items():  # at the expert's scale
                layer = dense.get_submodule(name)
                layer.weight += weight * (delta.T if type(layer).__name__ == "Conv1D" else delta)
    batch = pixels() if kind == "vit" else {"input_ids": torch.arange(4, 16).reshape(3, 4)}
    expected = logits_of(dense, batch)
    assert relative_difference(logits_of(loaded.model, batch), expected) > 1e-2
    for _ in range(2):  # PEFT notes its adapters in the base: none of the first time may be left
        with injected_sum(experts, weights, loaded) as model:
            assert relative_difference(logits_of(model, batch), expected) < 1e-5
        require_same(loaded, before)
    with pytest.raises(KeyboardInterrupt), injected_sum(experts[:2], [1.0, 1.0], loaded):
        raise KeyboardInterrupt
    require_same(loaded, before)


def test_every_expert_of_a_sum_is_checked_against_the_base(
    vit_base: Path, bert_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    fits, stranger = (
        open_expert(make_expert(tmp_path / "a", vit_base)),
        open_expert(make_expert(tmp_path / "b", bert_base)),
    )
    with (
        pytest.raises(PimergeError, match="the base has no module 'bert"),
        injected_sum([fits, stranger], [1, 1], loaded),
    ):
        pass


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_head_of_another_size_answers_zero_until_it_is_set_and_then_goes(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_base")
    if kind == "bert":  # without a pooler, which belongs to the head then
        folder = tmp_path / "bert"
        transformers.BertModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        base = folder
    task: Path = request.getfixturevalue("parity_task" if kind == "vit" else "text_task")
    loaded = load(base, task)
    before = state_of(loaded)
    batch = pixels() if kind == "vit" else {"input_ids": torch.arange(4, 16).reshape(3, 4)}
    expected = logits_of(loaded.model, batch)
    for labels in (5, 1):
        with head_of_size(loaded, find_base(str(base), None, base), open_task(task), labels):
            assert logits_of(loaded.model, batch).tolist() == [[0] * labels] * 3
            set_head(loaded.model, {"classifier.bias": torch.arange(float(labels))})
            assert logits_of(loaded.model, batch).tolist() == [list(range(labels))] * 3
        require_same(loaded, before)
    with pytest.raises(KeyboardInterrupt), head_of_size(loaded, find_base(str(base), None, base), open_task(task), 5):
        raise KeyboardInterrupt
    require_same(loaded, before)
    assert torch.equal(logits_of(loaded.model, batch), expected)


def test_bases_loads_a_base_once_for_tasks_of_as_many_labels(
    vit_base: Path, bert_base: Path, parity_task: Path, text_task: Path
) -> None:
    bases = Bases(CPU, torch.float32)
    vit, task = find_base(str(vit_base), None, vit_base), open_task(parity_task)
    first = bases.load(vit, task)
    assert bases.load(vit, task) is first
    other = bases.load(find_base(str(bert_base), None, bert_base), open_task(text_task))
    assert other is not first
    assert bases.load(vit, task) is not first


@pytest.mark.parametrize("plain", [True, False])
def test_a_head_is_copied_into_a_model_plain_or_pefts(
    vit_base: Path, make_expert: MakeExpert, tmp_path: Path, plain: bool
) -> None:
    model = model_for(vit_base)
    if not plain:
        model = PeftModel.from_pretrained(model, make_expert(tmp_path / "a", vit_base))
    head = {"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.tensor([1.0, -1.0])}
    set_head(model, head)
    assert logits_of(model.eval(), pixels()).tolist() == [[1, -1]] * 3


def test_a_head_that_does_not_fit_names_every_tensor(vit_base: Path) -> None:
    with pytest.raises(PimergeError) as caught:
        set_head(model_for(vit_base), {"classifier.weight": torch.zeros(3, 16), "score.weight": torch.zeros(1)})
    assert "no 'score.weight'" in str(caught.value)
    assert "'classifier.weight' is (3, 16), the model's (2, 16)" in str(caught.value)


def test_an_expert_of_another_base_is_told_by_its_modules(
    vit_base: Path, bert_base: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", bert_base))
    with pytest.raises(PimergeError) as caught:
        check_fits(expert, model_for(vit_base))
    assert "the base has no module 'bert.encoder.layer.0.attention.self.query'" in str(caught.value)
    assert "pass its own with --base" in str(caught.value)


@pytest.mark.parametrize("modules", [["c_attn"], ["c_fc"], ["c_fc", "wte"]])
def test_shapes_fit_whatever_way_the_base_stores_its_weights(
    gpt2_base: Path, make_expert: MakeExpert, tmp_path: Path, modules: list[str]
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", gpt2_base, target_modules=modules))
    check_fits(expert, model_for(gpt2_base))


def test_a_base_of_another_width_is_told_without_loading_it(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "pool" / "a", vit_base, parity_task)
    wide = tmp_path / "wide"
    config = transformers.ViTConfig(**{**model_for(vit_base).config.to_dict(), "hidden_size": 32})
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(wide)
    expert = open_expert(folder, str(wide))
    with pytest.raises(PimergeError) as caught:
        check_fits_on_disk(expert, open_task(folder))
    assert "ΔW is (16, 16), the base's weight (32, 32)" in str(caught.value)
    assert "the head's 'classifier.weight' is (2, 16), the task needs (2, 32)" in str(caught.value)


def test_a_head_for_other_labels_is_told_without_loading_the_base(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "a", vit_base, parity_task)
    write_json(tmp_path / "task.json", {**open_task(folder).file.model_dump(), "labels": ["a", "b", "c"]})
    with pytest.raises(PimergeError, match=r"the head's 'classifier.weight' is \(2, 16\), the task needs \(3, 16\)"):
        check_fits_on_disk(open_expert(folder), open_task(tmp_path))


def test_devices_and_dtypes_that_are_not_there_are_named() -> None:
    for device in ("cuda:99", "gpu"):
        with pytest.raises(PimergeError, match=rf"device '{device}' cannot be used.*\n.*--device cpu"):
            resolve_device(device)
    with pytest.raises(PimergeError, match="dtype is 'half'"):
        resolve_dtype("half", CPU)


@pytest.mark.parametrize("base", ["vit", "clip", "bert", "roberta", "t5", "gpt2", "own"])
def test_a_head_that_is_drawn_again_is_that_of_a_base_loaded_by_this_seed(
    request: pytest.FixtureRequest, parity_task: Path, text_task: Path, tmp_path: Path, base: str
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if base in ("roberta", "t5", "own"):
        config: Any = transformers.RobertaConfig(vocab_size=30, max_position_embeddings=32, **sizes)
        if base == "t5":
            config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        config.id2label = {0: "dog", 1: "cat"}
        kind: Any = transformers.AutoModelForSequenceClassification if base == "own" else transformers.AutoModel
        kind.from_config(config).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
    folder = tmp_path if base in ("roberta", "t5", "own") else request.getfixturevalue(f"{base}_base")
    task = open_task(parity_task if base in ("vit", "clip") else text_task)
    found = find_base(str(folder), None, folder)
    first, expected = (load_base(found, task, CPU, torch.float32, seed) for seed in (0, 7))
    for tensor in first.head_parameters():
        if base != "own":
            tensor.data.fill_(5.0)
    initialise_head(first, 7)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], value), name
    assert bool(first.drawn) != (base == "own")
