"""Tiny language models and adapters of any kind, for merges into a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from pimerge.merging.merge import merge
from pimerge.merging.merged import Merged
from tests.support.experts import set_config

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def filled(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter a random value, with normalisation weights near one, and tie what is tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else is_norm + 0.1 * noise)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def llama(folder: Path, seed: int = 0, **fields: Any) -> Any:
    """Save a tiny Llama, and return it."""
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **fields})
    model = filled(transformers.LlamaForCausalLM(config), seed)
    model.save_pretrained(folder)
    return model


def t5(folder: Path, **fields: Any) -> Any:
    """Save a tiny T5, and return it."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, **fields
    )
    model = filled(transformers.T5ForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def adapted(model: nn.Module, config: PeftConfig, folder: Path, base: Path, *, seed: int = 1, **save: Any) -> Any:
    """Move what an adapter trains, save it as an adapter of ``base``, and return PEFT's model."""
    made = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder, **save)
    set_config(folder, base_model_name_or_path=str(base))
    return made.eval()


def outputs(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    inputs = inputs or {"input_ids": IDS}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = {**inputs, "decoder_input_ids": IDS}
    with torch.no_grad():
        found = model.eval()(**inputs)
    result: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return result


def merged_into(experts: Any, base: Path, output: Path, **options: Any) -> Merged:
    """Merge experts into a checkpoint."""
    return merge(experts, into=base, output=output, ranking=output / "none.json", **options)


def opened(folder: Path, like: nn.Module) -> Any:
    """Load a checkpoint as a model of the same class; every tensor must have a place and every parameter a tensor."""
    model, report = type(like).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not report["mismatched_keys"]
    assert not report["missing_keys"], report
    return model.eval()
