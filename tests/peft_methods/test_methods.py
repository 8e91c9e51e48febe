"""The methods that PEFT does not ship, through PEFT's own calls on many architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from pimerge.peft_methods import BitFitConfig, BottleneckConfig

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGES = {"image_size": 16, "patch_size": 8}
BART: dict[str, Any] = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **IMAGES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=30, d_model=16, **BART)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=SMALL, vision_config=SMALL | IMAGES)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0)),
}
POSITIONS = {"bert": 4, "gpt2": 4, "vit": 4, "t5": 10, "bart": 5, "clip": 8, "llama": 4}
"""Where an adapter stands: after attention, after cross-attention and after the feed-forward block of every layer."""


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def answer(name: str, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1, 29, (2, 5), generator=generator)}
    if name in ("vit", "clip"):
        batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if name == "vit":
        del batch["input_ids"]
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = torch.randint(1, 29, (2, 3), generator=generator)
    with torch.no_grad():
        output = model(**batch)
    logits: Tensor = output.logits_per_image if name == "clip" else output.logits
    return logits


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", MODELS)
def test_a_bottleneck_starts_as_nothing_and_is_what_its_formula_says(name: str, tmp_path: Path) -> None:
    before = answer(name, fresh(name))
    model = get_peft_model(fresh(name), BottleneckConfig(bottleneck_dim=3, activation="gelu", scale=0.5)).eval()
    torch.testing.assert_close(answer(name, model), before)
    assert len(trained(model)) == 4 * POSITIONS[name]
    generator = torch.Generator().manual_seed(1)
    adapters: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, parameter in trained(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            module, _, slot = key.removeprefix("base_model.model.").partition(".bottleneck_")
            adapters.setdefault(module, {})[slot.replace(".default", "")] = parameter.detach()
    found = answer(name, model)
    assert not torch.allclose(found, before)

    by_hand = fresh(name)
    for module, parts in adapters.items():
        by_hand.get_submodule(module).register_forward_hook(
            lambda layer, args, y, parts=parts: (
                y
                + 0.5
                * (
                    torch.nn.functional.gelu(y @ parts["down.weight"].T + parts["down.bias"]) @ parts["up.weight"].T
                    + parts["up.bias"]
                )
            )
        )
    torch.testing.assert_close(found, answer(name, by_hand))

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    assert torch.equal(answer(name, PeftModel.from_pretrained(fresh(name), tmp_path).eval()), found)
    with model.disable_adapter():
        torch.testing.assert_close(answer(name, model), before)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("t5", "llama")])
def test_bitfit_replaces_every_bias_of_the_backbone(name: str, tmp_path: Path) -> None:
    plain = fresh(name)
    before = answer(name, plain)
    model = get_peft_model(fresh(name), BitFitConfig()).eval()
    torch.testing.assert_close(answer(name, model), before)
    head = ("classifier.", "score.")
    own = {key for key, _ in plain.named_parameters() if key.endswith(".bias") and not key.startswith(head)}
    assert len(trained(model)) == len(own)
    with torch.no_grad():
        for key, parameter in trained(model):
            parameter.add_(0.1)
            name_in_base = key.removeprefix("base_model.model.").replace(".bitfit_bias.default", ".bias")
            plain.get_parameter(name_in_base).add_(0.1)
    found = answer(name, model)
    torch.testing.assert_close(found, answer(name, plain))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(name, PeftModel.from_pretrained(fresh(name), tmp_path).eval()), found)
    torch.testing.assert_close(answer(name, model.merge_and_unload()), found)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_model_without_biases_has_nothing_to_train(name: str) -> None:
    with pytest.raises(ValueError, match="no biases"):
        get_peft_model(fresh(name), BitFitConfig())


def test_the_module_may_return_a_tuple() -> None:
    model = fresh("bert")
    config = BottleneckConfig(target_modules=["attention"], bottleneck_dim=2, init_weights=False)
    adapted = get_peft_model(model, config).eval()
    assert not torch.allclose(answer("bert", adapted), answer("bert", fresh("bert")))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="relu or gelu"):
        BottleneckConfig(activation="tanh")
    with pytest.raises(ValueError, match="at least 1"):
        BottleneckConfig(bottleneck_dim=0)
    with pytest.raises(ValueError, match="no bias"):
        get_peft_model(fresh("bert"), BitFitConfig(target_modules=["word_embeddings"]))
