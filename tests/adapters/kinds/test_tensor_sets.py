"""Kinds whose tensors are combined number by number: files as PEFT writes them, read, scaled, summed and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, PrefixTuningConfig, PromptEncoderConfig, RoadConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from pimerge import merge
from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.kind import KINDS as ALL_KINDS
from pimerge.adapters.tensor_sets import joined, read_slot
from pimerge.adapters.unhandled import NO_RULE, why_unhandled
from pimerge.core.errors import PimergeError
from pimerge.embedding.strengths import models_at_strengths, strengths_of
from pimerge.models.heads import set_head
from pimerge.models.injection import injected, injected_sum
from pimerge.models.loaded_base import LoadedBase
from tests.support.bases import inputs, loaded_base, model_for
from tests.support.experts import KINDS, PROMPTS, MakeExpert, edit_tensors
from tests.support.numerics import logits_of
from tests.support.tasks import write_json

BASES = {"bert": "text_task", "gpt2": "text_task", "vit": "parity_task"}
CASES = [(kind, base) for kind in KINDS for base in BASES if not (kind in PROMPTS and base == "vit")]


@pytest.fixture
def bases(vit_base: Path, bert_base: Path, gpt2_base: Path) -> dict[str, Path]:
    return {"vit": vit_base, "bert": bert_base, "gpt2": gpt2_base}


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_every_tensor_that_peft_writes_has_its_place_and_comes_back(
    make_expert: MakeExpert, bases: dict[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", bases[base], kind=kind))
    file = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert set(expert.keys) | set(expert.head.values()) == set(file)
    assert expert.parameters == sum(file[key].numel() for key in expert.keys)
    parts = {
        (name, slot): read_slot(each, expert.tensor)
        for name, group in expert.tensor_sets.items()
        for slot, each in group.slots.items()
    }
    assert all(tuple(part.shape) == expert.tensor_sets[name].slots[slot].shape for (name, slot), part in parts.items())
    for key, tensor in joined(expert.tensor_sets, parts).items():
        assert torch.equal(tensor, file[key])
    model = PeftModel.from_pretrained(model_for(bases[base]), tmp_path / "x")
    key_of = expert.strategy.key_of_parameter
    assert {key_of(name) for name, _ in model.named_parameters()} >= set(expert.keys)


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_plugged_in_it_answers_as_in_peft_and_the_base_is_as_before(
    make_expert: MakeExpert, bases: dict[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", bases[base], kind=kind))
    loaded, batch = loaded_base(bases[base]), inputs(base)
    before = logits_of(loaded.model, batch)
    expected = logits_of(PeftModel.from_pretrained(model_for(bases[base]), tmp_path / "x").eval(), batch)
    with injected(expert, loaded) as model:
        assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(logits_of(loaded.model, batch), before)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_strengths_lie_on_the_line_from_what_changes_nothing(
    make_expert: MakeExpert, bases: dict[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", bases[base], kind=kind, head=False))
    loaded, batch = loaded_base(bases[base]), inputs(base)
    if kind in PROMPTS:
        assert strengths_of(expert) == (1.0,)
        with pytest.raises(PimergeError, match="only has strength 1"):
            expert.with_strength(0.5)
        return
    before = logits_of(loaded.model, batch)
    with injected_sum([expert.with_strength(0.0)], [1.0], loaded) as model:
        torch.testing.assert_close(logits_of(model, batch), before)
    found = {scale: logits_of(model, batch) for scale, model in models_at_strengths(expert, loaded)}
    assert list(found) == [0.25, 0.5, 0.75, 1.0]
    edit_tensors(tmp_path / "x", lambda tensors: halve(tensors, loaded, expert))
    reference = PeftModel.from_pretrained(model_for(bases[base]), tmp_path / "x").eval()
    torch.testing.assert_close(found[0.5], logits_of(reference, batch))


def halve(tensors: dict[str, Tensor], loaded: LoadedBase, expert: Expert) -> None:
    """Half of the way, by hand."""
    for key in expert.keys:
        name = key.removeprefix("base_model.model.")
        if "ia3_l" in key:
            tensors[key] = (1 + tensors[key]) / 2
        elif "bottleneck_up" in key:
            tensors[key] = tensors[key] / 2
        elif "bottleneck" not in key:
            own = name.replace(".ln_tuning_layers", "").replace(".bitfit_bias", ".bias")
            tensors[key] = (tensors[key] + loaded.model.get_parameter(own)) / 2


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_a_mean_is_that_of_the_tensors(
    make_expert: MakeExpert, bases: dict[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    folders = [make_expert(tmp_path / str(seed), bases[base], kind=kind, seed=seed, head=False) for seed in range(3)]
    loaded, batch = loaded_base(bases[base]), inputs(base)
    with injected_sum([open_expert(folder) for folder in folders], [1 / 3] * 3, loaded) as model:
        set_head(model, open_expert(folders[0]).head_tensors())  # a prompt has one in any case
        found = logits_of(model, batch)
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]

    def mean(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: sum(file[key] for file in files) / 3 for key in open_expert(folders[0]).keys})

    edit_tensors(folders[0], mean)
    reference = PeftModel.from_pretrained(model_for(bases[base]), folders[0]).eval()
    torch.testing.assert_close(found, logits_of(reference, batch))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_on_images_is_refused(
    make_expert: MakeExpert, bert_base: Path, vit_base: Path, parity_task: Path, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, parity_task, kind=kind, head=False)
    with pytest.raises(PimergeError, match="is put before a text"):
        check_expert(open_expert(folder, str(vit_base)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PROMPTS])
def test_modules_that_the_base_lacks_are_named(
    make_expert: MakeExpert, bert_base: Path, vit_base: Path, kind: str, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", bert_base, kind=kind, head=False))
    with pytest.raises(PimergeError, match=r"no module 'bert\."):
        check_fits(expert, model_for(vit_base))


def test_a_head_that_the_base_lacks_is_named(
    make_expert: MakeExpert, bert_base: Path, gpt2_base: Path, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", bert_base, kind="prefix"))
    with pytest.raises(PimergeError, match=r"has no 'classifier\.bias' for the head"):
        check_fits(expert, model_for(gpt2_base))


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_other_shapes_than_the_bases_are_refused(
    make_expert: MakeExpert, bases: dict[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    import transformers

    folder = make_expert(tmp_path / "x", bases[base], kind=kind, head=False)
    config = transformers.AutoConfig.from_pretrained(bases[base])
    setattr(config, "n_embd" if base == "gpt2" else "hidden_size", 32)
    setattr(config, "n_inner" if base == "gpt2" else "intermediate_size", 48)
    auto = "AutoModelForImageClassification" if base == "vit" else "AutoModelForSequenceClassification"
    wider = getattr(transformers, auto).from_config(config)
    with pytest.raises(PimergeError, match=r"does not fit the base|the base's"):
        check_fits(open_expert(folder), wider, head=False)


SAVED_AS_VECTORS = {
    "PROMPT_TUNING": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
}


@pytest.mark.parametrize("peft_type", SAVED_AS_VECTORS)
def test_what_a_network_computed_is_used_as_the_vectors_that_peft_saves(
    peft_type: str, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_base("qwen2-lm")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = replace(SAVED_AS_VECTORS[peft_type], task_type="CAUSAL_LM")
        get_peft_model(model_for(base), config).save_pretrained(tmp_path / name)
    merge([tmp_path / "a"], output=tmp_path / "one")
    before, after = (
        logits_of(PeftModel.from_pretrained(model_for(base), tmp_path / name).eval(), inputs(base.name))
        for name in ("a", "one")
    )
    torch.testing.assert_close(after, before)
    merge([tmp_path / "a", tmp_path / "b"], method="interpolated", weights=[0.3, 0.7], output=tmp_path / "m")
    first, second, mean = (
        load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in "abm"
    )
    torch.testing.assert_close(mean, 0.3 * first + 0.7 * second)
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["peft_type"] == peft_type


FAULTS: dict[str, dict[str, Any]] = {
    "bottleneck": {"bottleneck_dim": 5},
    "prefix": {"num_layers": 3},
    "prompt": {"num_virtual_tokens": 7},
    "ia3": {"modules_to_save": 3},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_config_of_another_adapter_is_refused(
    make_expert: MakeExpert, bert_base: Path, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind=kind)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | FAULTS[kind])
    with pytest.raises(PimergeError, match=next(iter(FAULTS[kind]))):
        open_expert(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_without_a_place_is_refused_by_name(
    make_expert: MakeExpert, bert_base: Path, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind=kind)
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.stray.lora_A.weight": torch.ones(2, 2)}))
    with pytest.raises(PimergeError, match=r"stray\.lora_A"):
        open_expert(folder)


def test_a_kind_that_can_only_be_inspected_says_why(bert_base: Path, tmp_path: Path) -> None:
    config = RoadConfig(target_modules=["query"], group_size=4, modules_to_save=["classifier"])
    get_peft_model(model_for(bert_base), config).save_pretrained(tmp_path / "x")
    with pytest.raises(
        PimergeError, match=r"road, which can only be inspected: RoAd rotates(.|\n)*pimerge extract FOLDER"
    ):
        open_expert(tmp_path / "x")
    seen = open_expert(tmp_path / "x", only_look=True)
    file = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert seen.kind == "road"
    assert seen.parameters == sum(tensor.numel() for key, tensor in file.items() if "classifier" not in key)
    with pytest.raises(PimergeError, match="only be inspected"):
        check_expert(seen)


def test_feedforward_layers_that_are_no_targets_are_refused_as_peft_does(
    make_expert: MakeExpert, bert_base: Path, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind="ia3", target_modules=["query"], feedforward_modules=None)
    with pytest.raises(ValueError, match="should be a subset"):
        PeftModel.from_pretrained(model_for(bert_base), folder)
    with pytest.raises(PimergeError, match=r"feedforward_modules has output\.dense, which target_modules lacks"):
        open_expert(folder)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_every_kind_of_pefts_is_handled_or_has_a_reason_of_its_own(kind: str) -> None:
    handled = {each.peft_type for each in ALL_KINDS} | {"P_TUNING"}  # as prompt tuning
    assert (kind in handled) != (why_unhandled(kind) not in ("", NO_RULE))


@pytest.mark.parametrize("kind", ["ia3", "prompt", "loha"])
def test_empty_tensors_are_said_to_be_of_a_sharded_training(
    kind: str, make_expert: MakeExpert, bert_base: Path, tmp_path: Path
) -> None:
    def emptied(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: torch.zeros(0) for key in tensors})

    folder = edit_tensors(make_expert(tmp_path / "x", bert_base, kind=kind), emptied)
    with pytest.raises(PimergeError, match=r"tensors of the adapter are empty, such as .*ZeRO-3"):
        open_expert(folder)
