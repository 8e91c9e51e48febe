"""Heads and layers of models as transformers makes them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from pimerge.adapters.kind import KINDS
from pimerge.checkpoints.architecture import heads_of, layers_within, lora_targets, norms

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CLIP = transformers.CLIPConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 8, "patch_size": 4})
T5 = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
VIT = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)


def made(kind: type[nn.Module], config: transformers.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(
    ("kind", "config", "heads"),
    [
        (transformers.CLIPForImageClassification, CLIP, ["classifier"]),
        (transformers.ViTForImageClassification, VIT, ["classifier"]),
        (transformers.T5ForConditionalGeneration, T5, ["lm_head"]),
        (transformers.T5ForSequenceClassification, T5, ["classification_head"]),
    ],
)
def test_the_head_is_what_stands_on_the_backbone(
    kind: type[nn.Module], config: transformers.PreTrainedConfig, heads: list[str]
) -> None:
    model = made(kind, config)
    assert heads_of(model) == heads
    outside = {name for name, _ in model.named_modules()} - layers_within(model).keys()
    assert {name.partition(".")[0] for name in outside} == set(heads)


def test_fresh_experts_have_places_where_peft_knows_none() -> None:
    model = made(transformers.ViTForImageClassification, VIT)
    attention, mlp = "vit.layers.0.attention", "vit.layers.0.mlp"
    assert lora_targets(model) == [f"{attention}.q_proj", f"{attention}.v_proj"]
    assert norms(model) == ["vit.layers.0.layernorm_before", "vit.layers.0.layernorm_after", "vit.layernorm"]
    assert KINDS.load("ln-tuning").usual_places(model) == {"target_modules": norms(model)}
    places = KINDS.load("ia3").usual_places(model)
    assert places["target_modules"] == [f"{attention}.k_proj", f"{attention}.v_proj", f"{mlp}.fc2"]
    assert places["feedforward_modules"] == [f"{mlp}.fc2"]
    known = made(transformers.T5ForConditionalGeneration, T5)
    assert KINDS.load("ia3").usual_places(known) == KINDS.load("ln-tuning").usual_places(known) == {}
