"""Adapters whose modules have the names of an earlier version of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

import pimerge
from pimerge.adapters.expert import open_expert
from tests.support.names import DECODER, IDS, adapter, logits_of_sum, logits_with, rekeyed, saved_base

WEIGHTS = [0.7, 0.4]
QV = ["q_proj", "v_proj"]
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
SOUND = {"input_values": torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))}
_ROTATED = {**DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
Rename = Callable[[str], str]
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(intermediate_size=24, **VIT))


def _dinov2() -> nn.Module:
    return Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **VIT))


def _llava() -> nn.Module:
    vision = CLIPVisionConfig(intermediate_size=24, **VIT)
    config = LlavaConfig(text_config=LlamaConfig(**DECODER), vision_config=vision, image_token_id=63)
    config.tie_word_embeddings = False
    return LlavaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    text = {**DECODER, "head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4}
    vision = SiglipVisionConfig(intermediate_size=24, **VIT)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=63, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 16, "hidden_size": 16}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=_ROTATED, vision_config=vision)
    )


def _qwen2_5_vl() -> nn.Module:
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "intermediate_size": 24, "hidden_size": 16}
    vision |= {"out_hidden_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=_ROTATED, vision_config=vision)
    )


def _paligemma() -> nn.Module:
    vision = {"model_type": "siglip_vision_model", "intermediate_size": 24, **VIT}
    text = {**DECODER, "head_dim": 4, "model_type": "gemma"}
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=16)
    )


def _deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(intermediate_size=24, **VIT))


def _beit() -> nn.Module:
    return transformers.BeitForImageClassification(transformers.BeitConfig(intermediate_size=24, **VIT))


def _ast() -> nn.Module:
    sizes = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    config = transformers.ASTConfig(**{**VIT, "intermediate_size": 24, **sizes})
    return transformers.ASTForAudioClassification(config)


def _old_vit(key: str) -> str:
    key = re.sub(r"layers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense", key)
    key = re.sub(r"layers\.(\d+)\.attention\.q_proj", r"encoder.layer.\1.attention.attention.query", key)
    key = re.sub(r"layers\.(\d+)\.attention\.v_proj", r"encoder.layer.\1.attention.attention.value", key)
    key = re.sub(r"layers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense", key)
    return re.sub(r"layers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense", key)


QUERY_VALUE = {"q": "query", "v": "value"}


def _old_dinov2(key: str) -> str:
    key = re.sub(r"attention\.([qv])_proj", lambda match: f"attention.attention.{QUERY_VALUE[match[1]]}", key)
    return key.replace("attention.o_proj", "attention.output.dense")


def _old_llava(key: str) -> str:
    key = key.replace("model.model.language_model.", "model.language_model.model.")
    return re.sub(r"model\.model\.(?=vision_tower|multi_modal)", "model.", key)


def _old_llava_and_head(key: str) -> str:
    return _old_llava(key).replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")


def _old_qwen(key: str) -> str:
    return key.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def _old_beit(key: str) -> str:
    key = re.sub(r"layers\.(\d+)\.attention\.([qv])_proj", _beit_attention, key)
    key = re.sub(r"layers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense", key)
    return re.sub(r"layers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense", key)


def _beit_attention(match: re.Match[str]) -> str:
    return f"encoder.layer.{match[1]}.attention.attention.{QUERY_VALUE[match[2]]}"


ERAS: dict[str, tuple[Callable[[], nn.Module], list[str], Rename, dict[str, Tensor]]] = {
    "vit": (_vit, ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], _old_vit, PIXELS),
    "dinov2": (_dinov2, ["q_proj", "v_proj", "o_proj"], _old_dinov2, PIXELS),
    "llava": (_llava, ["language_model.*(q|v)_proj"], _old_llava, {}),
    "llava's image tower": (_llava, ["(language_model|vision_tower).*q_proj"], _old_llava, {}),
    "gemma3": (_gemma3, ["language_model.*(q|v)_proj"], _old_llava, {}),
    "qwen2_vl": (_qwen2_vl, ["(language_model.*(q|v)_proj|visual.*qkv)"], _old_qwen, {}),
    "qwen2_5_vl": (_qwen2_5_vl, ["(language_model.*(q|v)_proj|visual.*qkv)"], _old_qwen, {}),
    "paligemma": (_paligemma, ["(language_model.*q_proj|multi_modal.*linear)"], _old_llava, {}),
    "llava's head": (_llava, ["(language_model.*q_proj|lm_head)"], _old_llava_and_head, {}),
    "deit": (_deit, ["q_proj", "o_proj", "fc1"], _old_vit, PIXELS),
    "beit": (_beit, ["q_proj", "v_proj", "o_proj", "fc1"], _old_beit, PIXELS),
    "ast": (_ast, ["q_proj", "v_proj", "fc1"], _old_vit, SOUND),
}


@pytest.mark.parametrize("name", ERAS)
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_modules_of_an_earlier_transformers_have_today_s_names(
    tmp_path: Path, name: str, task_type: str | None
) -> None:
    make, targets, old, batch = ERAS[name]
    if task_type and batch:
        pytest.skip("an image model")
    base = saved_base(make(), tmp_path / "base")
    where = targets if len(targets) > 1 else f".*{targets[0]}"
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=where, task_type=task_type)
    first, second = (adapter(base, tmp_path / each, lora, seed) for seed, each in enumerate("ab"))
    assert not open_expert(first).renamed
    expected = logits_of_sum(base, [first, second], WEIGHTS, **batch)
    aged = rekeyed(second, old, tmp_path / "old", target_modules=["query", "q_proj"])
    assert open_expert(aged).renamed
    both = rekeyed(first, old, tmp_path / "both")
    for number, experts in enumerate(([first, aged], [both, aged])):
        out = pimerge.merge(experts, method="interpolated", weights=WEIGHTS, output=tmp_path / str(number)).path
        assert out is not None
        torch.testing.assert_close(logits_with(base, out, **batch), expected, rtol=1e-4, atol=1e-5)
    into = pimerge.merge(
        [both, second],
        method="interpolated",
        weights=WEIGHTS,
        head="none",
        into=tmp_path / "base",
        output=tmp_path / "w",
    ).path
    with torch.no_grad():
        found = type(base).from_pretrained(into).eval()(**(batch or IDS)).logits  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_alone_keeps_its_names(tmp_path: Path) -> None:
    saved_base(_vit(), tmp_path / "base")
    backbone = transformers.ViTModel.from_pretrained(tmp_path / "base")
    path = adapter(backbone, tmp_path / "a", LoraConfig(r=2, target_modules=QV))
    assert not open_expert(path).renamed
    old = rekeyed(path, _old_vit, tmp_path / "old")
    assert open_expert(old).modules == open_expert(path).modules
