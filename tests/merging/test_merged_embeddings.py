"""Adapters that hold or update embeddings and output layers, tied or resized, against PEFT's model of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from pimerge.core.errors import PimergeError
from pimerge.merging.merge import merge
from tests.support.experts import edit_tensors, set_config
from tests.support.into_cases import adapted, filled, llama, merged_into, opened, outputs, t5

TIED = {"tie_word_embeddings": True}
BOTH = ["embed_tokens", "lm_head"]
Q = {"target_modules": ["q_proj"]}


def updates(*modules: str, **config: Any) -> LoraConfig:
    """A LoRA on the queries and other modules."""
    return LoraConfig(r=4, target_modules=["q_proj", *modules], **config)


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], LoraConfig, int | None]] = {
    "embedding": (llama, {}, updates("embed_tokens"), None),
    "tied embedding": (llama, TIED, updates("embed_tokens"), None),
    "tied output": (llama, TIED, updates("lm_head"), None),
    "resized": (llama, {}, updates(*BOTH), 68),
    "resized and tied": (llama, TIED, updates("embed_tokens"), 68),
    "kept tied": (llama, TIED, updates(modules_to_save=["embed_tokens"], ensure_weight_tying=True), None),
    "kept tied, both named": (llama, TIED, updates(modules_to_save=BOTH, ensure_weight_tying=True), None),
    "kept tied, updates": (llama, TIED, updates("embed_tokens", ensure_weight_tying=True), None),
    "tied, one saved": (llama, TIED, updates(modules_to_save=["embed_tokens"]), None),
    "tied, output saved": (llama, TIED, updates(modules_to_save=["lm_head"]), None),
    "tokens": (llama, {}, updates("lm_head", trainable_token_indices={"embed_tokens": [5, 9]}), None),
    "tokens, tied": (llama, TIED, updates(trainable_token_indices=[5, 9]), None),
    "tokens, both": (llama, {}, updates(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}), None),
    "T5 tokens": (t5, {}, LoraConfig(target_modules=["q"], trainable_token_indices=[5, 9]), None),
    "T5 output": (t5, {}, LoraConfig(r=4, target_modules=["q", "lm_head"]), None),
    "T5 output saved": (t5, {}, LoraConfig(target_modules=["q"], modules_to_save=["lm_head"]), None),
    "T5 with its own output": (
        t5,
        {"tie_word_embeddings": False},
        LoraConfig(target_modules=["q", "lm_head"]),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_and_the_checkpoint_answer_as_peft(name: str, tmp_path: Path) -> None:
    make, fields, config, rows = CASES[name]
    base = make(tmp_path / "base", **fields)
    grown = copy.deepcopy(base)
    if rows is not None:
        grown.resize_token_embeddings(rows, mean_resizing=False)
    wanted = outputs(adapted(grown, config, tmp_path / "a", tmp_path / "base"))
    assert rows is not None or (wanted - outputs(base)).abs().max() > 1e-3
    merge(tmp_path / "a", output=tmp_path / "adapter", ranking=tmp_path / "none.json")
    found = PeftModel.from_pretrained(copy.deepcopy(grown), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), wanted, rtol=1e-5, atol=1e-5)
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    merged = opened(tmp_path / "out", base)
    torch.testing.assert_close(outputs(merged), wanted, rtol=1e-5, atol=1e-5)
    if "kept tied" in name and "updates" not in name:
        assert merged.config.tie_word_embeddings
        assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(
            load_file(tmp_path / "base" / "model.safetensors")
        )


@pytest.mark.parametrize("fields", [{}, TIED])
def test_embeddings_that_peft_saved_by_itself(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT saves both layers of a resized vocabulary, though no field of the config says so."""
    base = llama(tmp_path / "base", **fields)
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(68, mean_resizing=False)
    wanted = outputs(adapted(grown, updates(), tmp_path / "a", tmp_path / "base", save_embedding_layers=True))
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    merge(tmp_path / "a", output=tmp_path / "adapter", ranking=tmp_path / "none.json")
    other = copy.deepcopy(base)
    other.resize_token_embeddings(68)  # with other new rows
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(other, tmp_path / "adapter")), wanted)
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    found = opened(tmp_path / "out", base)
    torch.testing.assert_close(outputs(found), wanted, rtol=1e-5, atol=1e-5)
    assert (found.config.vocab_size, found.config.tie_word_embeddings) == (68, bool(fields))


def test_copies_of_the_bases_embeddings_count_as_nothing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    for seed, name in enumerate("ab"):
        adapted(base, updates(), tmp_path / name, tmp_path / "base", seed=seed, save_embedding_layers=True)
    two = [tmp_path / "a", tmp_path / "b"]
    merge(two, output=tmp_path / "m", ranking=tmp_path / "none.json")
    assert not [key for key in load_file(tmp_path / "m" / "adapter_model.safetensors") if "lora" not in key]
    for folder in two:  # the same embeddings, but not the base's: as if the vocabulary was retrained
        edit_tensors(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    merge(two, output=tmp_path / "n", ranking=tmp_path / "none.json")
    left = [key for key in load_file(tmp_path / "n" / "adapter_model.safetensors") if "lora" not in key]
    assert left == ["base_model.model.lm_head.weight"]
    edit_tensors(two[0], lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    merge(two, output=tmp_path / "o", ranking=tmp_path / "none.json")
    found = load_file(tmp_path / "o" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    torch.testing.assert_close(found, base.lm_head.weight + 1.5)


def test_tokens_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **TIED)
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(68, mean_resizing=False)
    adapted(grown, updates(trainable_token_indices=[5, 66]), tmp_path / "a", tmp_path / "base")
    with pytest.raises(PimergeError, match="the rows of the tokens 5, 66"):
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_base_saved_embeddings_are_kept(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapted(base, updates("embed_tokens"), tmp_path / "a", tmp_path / "base")
    set_config(tmp_path / "a", base_model_name_or_path="org/elsewhere")
    merge(tmp_path / "a", output=tmp_path / "m", ranking=tmp_path / "none.json")
    kept = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert torch.equal(kept["base_model.model.model.embed_tokens.base_layer.weight"], base.model.embed_tokens.weight)


def bart(folder: Path, **fields: Any) -> Any:
    """Save a tiny BART, which stores a bias of its logits, and return it."""
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        **sizes, vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **fields
    )
    model = filled(transformers.BartForConditionalGeneration(config))
    model.final_logits_bias.copy_(torch.arange(64.0)[None] / 64)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("modules", [[], ["shared"], ["lm_head"]])
@pytest.mark.parametrize("rows", [60, 68])
def test_a_resized_vocabulary_of_an_encoder_and_decoder(
    make: Callable[..., Any], modules: list[str], rows: int, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q" if make is t5 else "q_proj", *modules])
    wanted = outputs(adapted(grown, config, tmp_path / "a", tmp_path / "base", save_embedding_layers=True))
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    merged = opened(tmp_path / "out", base)
    assert merged.config.vocab_size == rows
    torch.testing.assert_close(outputs(merged), wanted, rtol=1e-5, atol=1e-5)


def test_a_resized_embedding_that_other_layers_share_is_named_with_the_layers_that_stay(tmp_path: Path) -> None:
    grown = copy.deepcopy(t5(tmp_path / "base"))
    grown.resize_token_embeddings(68)
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["shared"])
    adapted(grown, config, tmp_path / "a", tmp_path / "base")
    with pytest.raises(PimergeError, match=r"'lm_head.weight' are \(64, 16\) in the base, and the adapter does not"):
        merge(tmp_path / "a", into=tmp_path / "base", output=tmp_path / "out", ranking=tmp_path / "none.json")
    assert not (tmp_path / "out").exists()
