"""``pimerge.verify`` on tensors that adapters hold as a whole, against PEFT's models of the experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PromptTuningConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

import pimerge
from pimerge.core.errors import PimergeError
from tests.support.experts import edit_tensors, set_config
from tests.support.into_cases import adapted, llama, merged_into

WEIGHTS = [0.6, 0.3]
WITHOUT_UPDATE: dict[str, PeftConfig] = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "tokens": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 9]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def two(
    folder: Path, config: PeftConfig, **fields: Any
) -> tuple[list[Path], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Two experts, the state of PEFT's model of each, if it merges the kind, and the base's."""
    base, experts, states = llama(folder / "base", **fields), [], []
    for seed, name in enumerate("ab"):
        experts.append(folder / name)
        model = adapted(copy.deepcopy(base), copy.deepcopy(config), experts[-1], folder / "base", seed=seed)
        if hasattr(model, "merge_and_unload"):
            states.append({k: v.clone() for k, v in model.merge_and_unload().state_dict().items()})
    return experts, states, base.state_dict()


def summed(states: list[dict[str, Tensor]], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """W0 + Σ w (W_n − W0) of whole models."""
    return {
        key: value + sum(w * (state[key] - value) for w, state in zip(WEIGHTS, states, strict=True))
        for key, value in base.items()
    }


def saved(tensors: dict[str, Tensor], folder: Path, base: Path) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(
        {key: value.contiguous().clone() for key, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("name", [name for name in WITHOUT_UPDATE if name != "prompt"])
def test_kinds_without_an_update_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    experts, states, base = two(tmp_path, WITHOUT_UPDATE[name])
    merged = saved(summed(states, base), tmp_path / "full", tmp_path / "base")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=tmp_path / "base")
    assert found.equal, found.summary
    assert found.modules
    other = pimerge.verify(merged, experts=experts, weights=[0.3, 0.6], base=tmp_path / "base")
    assert (other.verdict, other.modules[0].reason) == ("weights", "the weights are in another order")
    assert pimerge.verify(tmp_path / "base", experts=experts, base=tmp_path / "base").verdict == "base"


@pytest.mark.parametrize("name", WITHOUT_UPDATE)
def test_kinds_without_an_update_as_adapters(name: str, tmp_path: Path) -> None:
    experts, _, base = two(tmp_path, WITHOUT_UPDATE[name])
    files = [load_file(expert / "adapter_model.safetensors") for expert in experts]
    pimerge.merge(experts, method="interpolated", weights=[0.5, 0.5], output=tmp_path / "out")
    assert pimerge.verify(tmp_path / "out", experts=experts).equal
    neutral = {
        "ia3": lambda key: torch.ones(()),
        "ln_tuning": lambda key: base[key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")],
        "tokens": lambda key: base["model.embed_tokens.weight"][[3, 9]],
        "prompt": lambda key: torch.zeros(()),
    }[name]

    def combine(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            zero = neutral(key)
            tensors[key] = zero + sum(w * (file[key] - zero) for w, file in zip(WEIGHTS, files, strict=True))

    edit_tensors(tmp_path / "out", combine)
    found = pimerge.verify(tmp_path / "out", experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    wrong = pimerge.verify(tmp_path / "out", experts=experts)
    assert wrong.verdict == "weights"
    assert wrong.modules[0].weights == pytest.approx(WEIGHTS, rel=1e-3)


def test_a_prompt_is_not_in_a_checkpoint(tmp_path: Path) -> None:
    experts, _, _ = two(tmp_path, WITHOUT_UPDATE["prompt"])
    with pytest.raises(PimergeError, match="which no checkpoint can hold"):
        pimerge.verify(tmp_path / "base", experts=experts, base=tmp_path / "base")


@pytest.mark.parametrize("lora_bias", [False, True])
def test_biases_that_are_trained_and_updated(lora_bias: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", lora_bias=lora_bias)
    experts, states, base = two(tmp_path, config, attention_bias=True)
    right = summed(states, base)
    merged = saved(right, tmp_path / "full", tmp_path / "base")
    given: dict[str, Any] = {"experts": experts, "weights": WEIGHTS, "base": tmp_path / "base"}
    found = pimerge.verify(merged, **given)
    assert found.equal, found.summary
    key = "model.layers.0.self_attn.q_proj.bias"
    found = pimerge.verify(saved(right | {key: base[key]}, tmp_path / "other", tmp_path / "base"), **given)
    assert {each.name for each in found.modules if each.verdict != "equal"} == {key}
    assert found.verdict == "base"
    pimerge.merge(experts, method="interpolated", weights=WEIGHTS, output=tmp_path / "out")
    found = pimerge.verify(tmp_path / "out", **given)
    assert found.equal, found.summary
    merged_into(experts, tmp_path / "base", tmp_path / "into", method="interpolated", weights=WEIGHTS)
    assert pimerge.verify(tmp_path / "into", **given).equal

    def apart(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith("layers.1.self_attn.v_proj.bias"))
        tensors[name] *= 1.5

    edit_tensors(tmp_path / "out", apart)
    found = pimerge.verify(tmp_path / "out", **given)
    assert {each.name for each in found.modules if each.verdict != "equal"} == {"model.layers.1.self_attn.v_proj.bias"}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 9]),
    ],
)
def test_embeddings_of_a_merged_adapter(config: LoraConfig, tmp_path: Path) -> None:
    experts, _, _ = two(tmp_path, config)
    pimerge.merge(experts, method="interpolated", weights=WEIGHTS, output=tmp_path / "out")
    found = pimerge.verify(tmp_path / "out", experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    assert "model.embed_tokens.weight" in [each.name for each in found.modules]

    def wrong(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if "embed_tokens" in name)
        tensors[name] += 0.1

    edit_tensors(tmp_path / "out", wrong)
    found = pimerge.verify(tmp_path / "out", experts=experts, weights=WEIGHTS)
    assert [each.name for each in found.modules if each.verdict != "equal"] == ["model.embed_tokens.weight"]


def test_without_the_base_values_are_compared_if_the_weights_sum_to_one(tmp_path: Path) -> None:
    experts, _, _ = two(tmp_path, WITHOUT_UPDATE["ln_tuning"])
    pimerge.merge(experts, method="interpolated", weights=[0.4, 0.6], output=tmp_path / "out")
    for folder in (*experts, tmp_path / "out"):
        set_config(folder, base_model_name_or_path="org/gone")
    assert pimerge.verify(tmp_path / "out", experts=experts, weights=[0.4, 0.6]).equal
    with pytest.raises(PimergeError, match="not on this machine"):
        pimerge.verify(tmp_path / "out", experts=experts, weights=[0.4, 0.5])


SAVED: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(("lora", "into"), [(SAVED, False), (SAVED, True), ({}, False)])
def test_vocabularies_of_two_sizes(lora: dict[str, Any], into: bool, tmp_path: Path) -> None:
    base, experts = llama(tmp_path / "base"), []
    config = LoraConfig(r=2, target_modules=["q_proj", *([] if lora else ["embed_tokens", "lm_head"])], **lora)
    for seed, (name, size) in enumerate((("a", 68), ("b", 66))):
        grown = copy.deepcopy(base)
        grown.resize_token_embeddings(size)
        adapted(grown, copy.deepcopy(config), tmp_path / name, tmp_path / "base", seed=seed)
        experts.append(tmp_path / name)
    options: dict[str, Any] = {"into": tmp_path / "base"} if into else {}
    pimerge.merge(experts, method="interpolated", weights=WEIGHTS, output=tmp_path / "out", **options)
    found = pimerge.verify(tmp_path / "out", experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    assert any("embed_tokens" in remark for remark in found.remarks)

    def wrong(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "embed_tokens" in name:
                tensors[name] *= 1.1

    if not into:
        edit_tensors(tmp_path / "out", wrong)
        assert not pimerge.verify(tmp_path / "out", experts=experts, weights=WEIGHTS).equal


def test_a_scaled_output_layer_of_a_tied_base(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])
    experts, _, _ = two(tmp_path, config, tie_word_embeddings=True)
    merged_into(experts, tmp_path / "base", tmp_path / "full", method="interpolated", weights=WEIGHTS)
    found = pimerge.verify(tmp_path / "full", experts=experts, weights=WEIGHTS, base=tmp_path / "base")
    assert found.equal, found.summary
    assert "lm_head.weight" in [each.name for each in found.modules]
