"""Names in other model classes of a base than the one in its config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pimerge.checkpoints.base_classes import modules_of_model

CLASSES = {
    "Gemma3ForCausalLM": ("ShieldGemma2ForImageClassification", "CAUSAL_LM"),
    "Dots3NoteForCausalLM": ("Dots3NoteForConditionalGeneration", "CAUSAL_LM"),
    "Dots3NoteTextModel": ("Dots3NoteForConditionalGeneration", None),
    "Qwen2VLTextModel": ("Qwen2VLForConditionalGeneration", None),
    "RfDetrModel": ("RfDetrForInstanceSegmentation", None),
}


@pytest.mark.parametrize("name", CLASSES)
def test_names_of_any_class_of_the_base_stay(name: str) -> None:
    whole, task_type = CLASSES[name]
    base = getattr(transformers, whole)
    config = base.config_class()
    own = getattr(transformers, name)
    parts = [config, *(getattr(config, part) for part in config.sub_configs)]
    with torch.device("meta"):
        known = modules_of_model(base(config))
        model: Any = own(next(part for part in parts if isinstance(part, own.config_class)))
    layers = [each for each, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert {each for each in layers if known.place(each, task_type) not in (each, None)} == set()
    assert len(layers) > 10


def test_a_name_of_an_earlier_version_is_not_that_of_a_class_today() -> None:
    base = transformers.Qwen2VLForConditionalGeneration
    with torch.device("meta"):
        known = modules_of_model(base(base.config_class()))
    for task_type in (None, "CAUSAL_LM"):
        found = known.place("model.layers.0.self_attn.q_proj", task_type)
        assert found == "model.language_model.layers.0.self_attn.q_proj"
        both = known.place_all(["model.layers.0.mlp.up_proj", "visual.blocks.0.attn.qkv"], task_type)
        assert both["visual.blocks.0.attn.qkv"] == "model.visual.blocks.0.attn.qkv"
    assert known.place("visual.blocks.0.attn.qkv") == "visual.blocks.0.attn.qkv"  # of the backbone's class


def test_the_head_of_an_earlier_multimodal_model_is_renamed() -> None:
    base = transformers.LlavaForConditionalGeneration
    with torch.device("meta"):
        known = modules_of_model(base(base.config_class()))
    for task_type in (None, "CAUSAL_LM"):
        assert known.place("language_model.lm_head", task_type) == "lm_head"
