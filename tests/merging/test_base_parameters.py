"""Adapters that hold trained parameters of their base (embeddings, tokens, biases), against PEFT's models of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from pimerge.core.errors import PimergeError
from pimerge.merging.merge import merge
from pimerge.merging.verification.verify import verify
from tests.support.experts import set_config
from tests.support.into_cases import adapted, llama, merged_into, opened, outputs

BIASED = {"attention_bias": True, "mlp_bias": True}
BOTH = ["embed_tokens", "lm_head"]


def updates(*modules: str, **config: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", *modules], **config)


CASES: dict[str, tuple[LoraConfig, LoraConfig]] = {
    "all biases": (updates(bias="all"), updates("o_proj", bias="all")),
    "biases of one": (updates(bias="all"), updates("o_proj")),
    "biases of the adapted": (updates("k_proj", bias="lora_only"), updates(bias="lora_only")),
    "biases and their updates": (updates(bias="all", lora_bias=True), updates(lora_bias=True)),
    "saved embeddings": (updates(modules_to_save=BOTH), updates(modules_to_save=BOTH)),
    "one saved": (updates(modules_to_save=["lm_head"]), updates(modules_to_save=["embed_tokens"])),
    "saved by one": (updates(), updates(modules_to_save=["embed_tokens"])),
    "the same tokens": (updates(trainable_token_indices=[5, 9]), updates(trainable_token_indices=[5, 9])),
    "other tokens": (updates(trainable_token_indices=[5, 9]), updates(trainable_token_indices=[9, 7])),
    "tokens of two layers": (
        updates(trainable_token_indices={"embed_tokens": [5], "lm_head": [7]}),
        updates(trainable_token_indices={"embed_tokens": [6]}),
    ),
    "updated by one, tokens of the other": (updates("lm_head"), updates(trainable_token_indices=[5])),
}


def summed(base: nn.Module, folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """W0 + Σ w_n (W_n − W0) of every parameter, where PEFT merges each expert into the base."""
    start = {name: value.double() for name, value in base.state_dict().items()}
    total = {name: value.clone() for name, value in start.items()}
    for folder, weight in zip(folders, weights, strict=True):
        model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()
        for name, value in model.state_dict().items():
            total[name] += weight * (value.double() - start[name])
    return total


@pytest.mark.parametrize("weights", [[0.6, 0.4], [0.5, 1.0]])
@pytest.mark.parametrize("name", CASES)
def test_the_adapter_and_the_checkpoint_are_the_weighted_sum(name: str, weights: list[float], tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **BIASED)
    experts = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, config) in enumerate(zip(experts, CASES[name], strict=True)):
        adapted(base, config, folder, tmp_path / "base", seed=seed)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(summed(base, experts, weights))
    options = {"method": "interpolated", "weights": weights, "ranking": tmp_path / "none.json"}
    merge(experts, output=tmp_path / "adapter", **options)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-5, atol=1e-5)
    merge(experts, into=tmp_path / "base", output=tmp_path / "out", **options)
    torch.testing.assert_close(outputs(opened(tmp_path / "out", base)), outputs(wanted), rtol=1e-5, atol=1e-5)
    if name != "biases and their updates":  # verify takes the trained bias for the base's there
        assert verify(tmp_path / "out", experts=experts, weights=weights, base=tmp_path / "base").equal


def test_biases_are_averaged_without_the_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **BIASED)
    experts = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(experts):
        adapted(base, updates(bias="all"), folder, tmp_path / "base", seed=seed)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(summed(base, experts, [0.5, 0.5]))
    for folder in experts:
        set_config(folder, base_model_name_or_path="org/elsewhere")
    none = {"ranking": tmp_path / "none.json"}
    merge(experts, output=tmp_path / "adapter", **none)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-5, atol=1e-5)
    with pytest.raises(PimergeError, match="needs values of the base 'org/elsewhere'"):
        merge(experts, weights=[1, 1], output=tmp_path / "sum", **none)


def test_one_expert_at_half_its_weight_has_half_of_its_embeddings(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapted(base, updates(modules_to_save=BOTH), tmp_path / "a", tmp_path / "base")
    wanted = summed(base, [tmp_path / "a"], [0.5])["model.embed_tokens.weight"].float()
    merged = merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out", weights=[0.5])
    assert merged.plan["handled"]
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], wanted)


@pytest.mark.parametrize("name", ["base", "org/elsewhere"])
def test_a_checkpoint_is_the_base_of_the_experts_that_are_merged_into_it(name: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **BIASED)
    experts = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, config) in enumerate(zip(experts, [updates(use_dora=True), updates(bias="all")], strict=True)):
        adapted(base, config, folder, tmp_path / "base", seed=seed)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(summed(base, experts, [0.5, 1.0]))
    for folder in experts:
        set_config(folder, base_model_name_or_path=name)
    merged_into(experts, tmp_path / "base", tmp_path / "out", weights=[0.5, 1.0])
    torch.testing.assert_close(outputs(opened(tmp_path / "out", base)), outputs(wanted), rtol=1e-5, atol=1e-5)


def test_without_heads_rows_of_tokens_are_merged_and_saved_embeddings_are_left_out(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    experts = [tmp_path / "a", tmp_path / "b"]
    rows = [updates(trainable_token_indices=[5, 9]), updates(trainable_token_indices=[9, 7])]
    for seed, (folder, config) in enumerate(zip(experts, rows, strict=True)):
        adapted(base, config, folder, tmp_path / "base", seed=seed)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(summed(base, experts, [0.6, 0.4]))
    options = {"weights": [0.6, 0.4], "head": "none", "ranking": tmp_path / "none.json"}
    merge(experts, output=tmp_path / "adapter", **options)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-5, atol=1e-5)
    adapted(base, updates(modules_to_save=["embed_tokens"]), tmp_path / "c", tmp_path / "base")
    merged = merge([tmp_path / "c"], output=tmp_path / "plain", head="none", ranking=tmp_path / "none.json")
    assert not any("embed" in key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert any("embed_tokens.weight) are left out" in line for line in merged.plan["handled"])
