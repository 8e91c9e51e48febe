"""Experts and models written tensor by tensor, so that a test knows every number in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
Updates = Mapping[str, tuple[Tensor, Tensor]]

small = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Of hypothesis tests: the same examples in every run."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers by a seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def updates_of(shapes: Mapping[str, tuple[int, int, int]], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (d_out, r, d_in) as module → (A, B)."""
    return {
        name: (normal(r, d_in, seed=seed + i), normal(d_out, r, seed=seed + 100 + i))
        for i, (name, (d_out, r, d_in)) in enumerate(shapes.items())
    }


def raw_expert(folder: Path, updates: Updates, extra: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """An expert of Linear modules; by default alpha is r, so that the scaling is 1."""
    ranks = {f"^{name}": len(A) for name, (A, _) in updates.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(extra or {})
    for name, (A, B) in updates.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A.contiguous(), f"{PREFIX}{name}.lora_B.weight": B.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(ranks.values(), default=1),
        "rank_pattern": ranks,
        "alpha_pattern": {} if "lora_alpha" in config or "use_rslora" in config else ranks,
        "target_modules": sorted(updates),
    }
    (folder / "adapter_config.json").write_text(json.dumps(document | config))
    return folder


def set_config(folder: Path, **fields: Any) -> Path:
    """Change fields of an expert's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def set_tensors(folder: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Replace tensors of an expert, or remove those that are None."""
    path = folder / "adapter_model.safetensors"
    changed = load_file(path) | dict(tensors)
    save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, path)
    return folder


class Layers(nn.Module):
    """One layer of each type that LoRA adapts; the name ``proj`` ends the name ``inner.proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        self.conv = nn.Conv2d(2, 4, (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Token indices (batch, 4) → numbers (batch, 4, 2, 2)."""
        hidden = self.inner["other"](self.inner["proj"](self.proj(self.words(x))))
        return self.conv(hidden.reshape(-1, 2, 4, 3))  # type: ignore[no-any-return]


def layers() -> Layers:
    """The same :class:`Layers` every time."""
    torch.manual_seed(0)
    return Layers().eval()


def layers_expert(folder: Path, seed: int = 0, **config: Any) -> Path:
    """An expert of :class:`Layers`, made by PEFT with random factors."""
    model = get_peft_model(layers(), LoraConfig(**({"r": 2, "lora_alpha": 3} | config)))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(normal(*parameter.shape, seed=100 * seed + i, scale=0.3))
    model.save_pretrained(folder)
    return set_config(folder, base_model_name_or_path="org/layers")


def save_base(folder: Path, weight: Tensor, file: str = "model.safetensors") -> Path:
    """A folder that looks like a base model's, with one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": weight}, folder / file)
    return folder
