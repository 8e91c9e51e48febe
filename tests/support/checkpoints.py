"""Folders of full checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.numerics import normal

INPUTS = {
    "bert": {"input_ids": torch.arange(10).view(2, 5)},
    "gpt2": {"input_ids": torch.arange(10).view(2, 5)},
    "vit": {"pixel_values": normal(2, 3, 16, 16)},
}


def logits(model: Any, kind: str) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        result: Tensor = model.eval()(**INPUTS[kind]).logits
    return result


def contents(folder: Path) -> dict[str, bytes]:
    """File name → bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


Tensors = dict[str, Tensor]


def shaken(base: Path, folder: Path, seed: int, edit: Callable[[Tensors], None] = lambda found: None) -> Path:
    """The base with every float moved a little."""
    shutil.copytree(base, folder)
    found = load_file(folder / "model.safetensors")
    for index, (key, value) in enumerate(sorted(found.items())):
        if value.is_floating_point():
            found[key] = (value.float() + 0.1 * normal(*value.shape, seed=100 * seed + index)).to(value.dtype)
    edit(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


def set_checkpoint_config(folder: Path, **fields: Any) -> Path:
    """Change a checkpoint's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
