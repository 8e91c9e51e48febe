"""Adapters under other module names: PEFT writes them, then their keys are changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.experts import edit_tensors, set_config

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])}
DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved_base(model: Any, folder: Path) -> nn.Module:
    """A model with weights large enough for differences to show, saved by transformers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.25 * noise if weight.dim() > 1 else 0.05 * noise + (weight.mean() > 0.5))
    model.tie_weights()
    model.save_pretrained(folder)
    found: nn.Module = model.eval()
    return found


def adapter(base: nn.Module, folder: Path, config: PeftConfig, seed: int = 1) -> Path:
    """An expert of random trained tensors on a base in the folder ``base`` beside it or above it."""
    model = get_peft_model(deepcopy(base), deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return set_config(folder, base_model_name_or_path="base")


def rekeyed(folder: Path, rename: Callable[[str], str], copy: Path | None = None, **fields: Any) -> Path:
    """Rename the keys of an expert, or of a copy of it, and change fields of its config."""
    if copy is not None:
        copy.mkdir(parents=True)
        for file in folder.glob("adapter_*"):
            (copy / file.name).write_bytes(file.read_bytes())
        folder = copy

    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {rename(key): value for key, value in tensors.items()}
        assert len(renamed) == len(tensors)
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(folder, edit)
    return set_config(folder, **fields)


def logits_with(base: nn.Module, folder: Path, **batch: Tensor) -> Tensor:
    """Logits of a base with an adapter, which PEFT must load without a missing or an unexpected key."""
    with torch.no_grad():
        output: Tensor = _loaded(base, folder).eval()(**(batch or IDS)).logits
    return output


def logits_of_sum(
    base: nn.Module, folders: Sequence[Path], weights: Sequence[float], *, head: int = 0, **batch: Tensor
) -> Tensor:
    """Logits of W0 + Σ w_n ΔW_n under the head of one expert, where PEFT merges each expert into the base."""
    start = {name: value.double() for name, value in base.state_dict().items()}
    summed = {name: value.clone() for name, value in start.items()}
    saved: dict[str, Tensor] = {}
    for number, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        model: Any = _loaded(base, folder)
        heads = {name for name, module in model.named_modules() if hasattr(module, "modules_to_save")}
        merged = {name: value.double() for name, value in model.merge_and_unload().state_dict().items()}
        for name, value in merged.items():
            if any(f"base_model.model.{name}".startswith(f"{owner}.") for owner in heads):
                saved |= {name: value} if number == head else {}
            else:
                summed[name] += weight * (value - start[name])
    result = deepcopy(base)
    result.load_state_dict({**summed, **saved})
    with torch.no_grad():
        output: Tensor = result.eval()(**(batch or IDS)).logits
    return output


def _loaded(base: nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected)")
        return PeftModel.from_pretrained(deepcopy(base), str(folder))
