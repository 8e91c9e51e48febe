"""Open outputs with PEFT, strictly: every key is used, and none is missing."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.support.numerics import normal


def open_strictly(model: nn.Module, folder: Path) -> PeftModel:
    """PEFT's model of an adapter, in eval mode; missing and unexpected keys are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = PeftModel.from_pretrained(model, str(folder))
        again = found.load_adapter(str(folder), "default")
    assert not [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    assert set(again.unexpected_keys) <= {"prompt_embeddings"}  # which PEFT loads apart from the model
    return found.eval()


def adapter_of(model: nn.Module, config: PeftConfig, folder: Path, seed: int = 0, scale: float = 0.1) -> PeftModel:
    """An expert of a model whose adapter is random and whose head is the base's own, saved by PEFT."""
    made = get_peft_model(model, config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(made.named_parameters())):
            if parameter.requires_grad and ".modules_to_save." not in name:
                parameter.add_(normal(*parameter.shape, seed=1000 * seed + i, scale=scale))
    made.save_pretrained(folder)
    return made.eval()
