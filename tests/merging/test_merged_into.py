"""Merges into a checkpoint give a checkpoint that transformers loads, with the outputs of PEFT's merged model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig

from pimerge.core.errors import PimergeError
from tests.support.bases import save_tokenizer
from tests.support.into_cases import SIZES, adapted, filled, llama, merged_into, opened, outputs


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Outputs agree up to rounding."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def resized(model: Any, rows: int = 68) -> Any:
    """A copy with more tokens."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("rows", [68, 60])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary(rows: int, tied: bool, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    wanted = adapted(resized(base, rows), config, tmp_path / "a", tmp_path / "base").merge_and_unload()
    save_tokenizer(tmp_path / "a")
    (tmp_path / "base" / "vocab.txt").write_text("old")
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    found = opened(tmp_path / "out", base)
    assert found.config.vocab_size == rows
    same(outputs(found), outputs(wanted))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_a_vocabulary_that_is_resized_in_part_only(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    adapted(resized(base), config, tmp_path / "a", tmp_path / "base", save_embedding_layers=False)
    with pytest.raises(PimergeError, match=r"'lm_head.weight' is \(64, 16\)[\s\S]*needs \(68, 16\)"):
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_of_a_text_part(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        image_token_id=63,
    )
    base = filled(transformers.LlavaForConditionalGeneration(made))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wanted = adapted(resized(base), config, tmp_path / "a", tmp_path / "base").merge_and_unload()
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    found = opened(tmp_path / "out", base)
    assert found.config.text_config.vocab_size == 68
    same(outputs(found), outputs(wanted))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", None])
def test_a_classifier_without_a_task(task_type: str | None, tmp_path: Path) -> None:
    """The number of labels and the class of the model follow the head."""
    settings = transformers.BertConfig(**SIZES, num_labels=3)
    kind = transformers.BertForTokenClassification if task_type == "TOKEN_CLS" else None
    kind = kind or transformers.BertForSequenceClassification
    model = filled(kind(settings))
    base = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    base.bert = copy.deepcopy(model.bert)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type=task_type)
    wanted = adapted(model, config, tmp_path / "a", tmp_path / "base").merge_and_unload()
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["architectures"], len(stated["id2label"])) == ([kind.__name__], 3)
    found = kind.from_pretrained(tmp_path / "out").eval()
    if task_type != "TOKEN_CLS":
        found.bert.pooler.load_state_dict(wanted.bert.pooler.state_dict())  # a masked language model has none
    same(outputs(found), outputs(wanted))
