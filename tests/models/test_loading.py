"""Loading a base, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pimerge.adapters.base_fit import check_fits, check_fits_on_disk
from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.models.loading import Bases, load_base, resolve_device, resolve_dtype
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.experts import MakeExpert
from tests.support.loading import CPU, load
from tests.support.tasks import write_json


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


def test_a_base_of_another_architecture_names_itself_and_the_task(bert_base: Path, parity_task: Path) -> None:
    with pytest.raises(PimergeError, match=r"bert'.* cannot be loaded for image-classification"):
        load(bert_base, parity_task)


def test_bases_loads_a_base_once_for_tasks_with_equally_many_labels(
    vit_base: Path, bert_base: Path, parity_task: Path, text_task: Path
) -> None:
    bases = Bases(CPU, torch.float32)
    vit, task = find_base(str(vit_base), None, vit_base), open_task(parity_task)
    first = bases.load(vit, task)
    assert bases.load(vit, task) is first
    other = bases.load(find_base(str(bert_base), None, bert_base), open_task(text_task))
    assert other is not first
    assert bases.load(vit, task) is not first


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
    assert "ΔW is (16, 16), but the base's weight is (32, 32)" in str(caught.value)
    assert "the head's 'classifier.weight' is (2, 16), but the task needs (2, 32)" in str(caught.value)


def test_a_head_for_other_labels_is_told_without_loading_the_base(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "a", vit_base, parity_task)
    write_json(tmp_path / "task.json", {**open_task(folder).file.model_dump(), "labels": ["a", "b", "c"]})
    with pytest.raises(
        PimergeError, match=r"the head's 'classifier.weight' is \(2, 16\), but the task needs \(3, 16\)"
    ):
        check_fits_on_disk(open_expert(folder), open_task(tmp_path))


def test_devices_and_dtypes_that_are_not_there_are_named() -> None:
    for device in ("cuda:99", "gpu"):
        with pytest.raises(PimergeError, match=rf"device '{device}' cannot be used.*\n.*--device cpu"):
            resolve_device(device)
    with pytest.raises(PimergeError, match="got 'half'"):
        resolve_dtype("half", CPU)
