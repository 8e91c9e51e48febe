"""Trained modules beside ΔW (``modules_to_save``), which PEFT finds by the ending of their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors import safe_open
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import pimerge
from pimerge.adapters.expert import open_expert
from tests.support.names import DECODER, adapter, logits_of_sum, logits_with, saved_base

WEIGHTS = [0.7, 0.4]


def distilbert(folder: Path) -> DistilBertForSequenceClassification:
    sizes = {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
    return saved_base(DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=2)), folder)


def test_the_head_of_distilbert_has_both_of_its_modules(tmp_path: Path) -> None:
    base = distilbert(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")
    experts = [adapter(base, tmp_path / name, lora, seed) for seed, name in enumerate("ab")]
    assert sorted(open_expert(experts[0]).head) == [
        f"{module}.{each}" for module in ("classifier", "pre_classifier") for each in ("bias", "weight")
    ]
    merged = pimerge.merge(experts, method="interpolated", weights=WEIGHTS, target=experts[1], output=tmp_path / "out")
    expected = logits_of_sum(base, experts, WEIGHTS, head=1)
    assert merged.path is not None
    torch.testing.assert_close(logits_with(base, merged.path), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_name_within_words_saves_every_norm(tmp_path: Path, kind: str) -> None:
    base = saved_base(LlamaForCausalLM(LlamaConfig(**DECODER)), tmp_path / "base")
    config = (
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
        if kind == "lora"
        else IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"])
    )
    expert = adapter(base, tmp_path / "a", config)
    assert "model.layers.1.post_attention_layernorm.weight" in open_expert(expert).head
    out = pimerge.merge(expert, target=expert, output=tmp_path / "out").path
    assert out is not None
    torch.testing.assert_close(logits_with(base, out), logits_with(base, expert), rtol=1e-4, atol=1e-5)


def test_a_trained_embedding_that_was_resized_is_read_once(tmp_path: Path) -> None:
    """PEFT saves it under three names, and loads one."""
    base = saved_base(LlamaForCausalLM(LlamaConfig(**DECODER)), tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")  # where PEFT finds the vocabulary's old size
    base.resize_token_embeddings(70)
    saved = ["embed_tokens", "lm_head"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    experts = [adapter(base, tmp_path / name, lora, seed) for seed, name in enumerate("ab")]
    with safe_open(experts[0] / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.lm_head.modules_to_save.weight" in file.keys()  # noqa: SIM118
    assert sorted(open_expert(experts[0]).head) == ["lm_head.weight", "model.embed_tokens.weight"]
    merged = pimerge.merge(
        experts, method="interpolated", weights=WEIGHTS, target=experts[1], verify=True, output=tmp_path / "out"
    )
    assert merged.path is not None
    expected = logits_of_sum(base, experts, WEIGHTS, head=1)
    torch.testing.assert_close(logits_with(base, merged.path), expected, rtol=1e-4, atol=1e-5)
