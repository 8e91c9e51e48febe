"""Tensors of adapters of any tool are told from plain weights, which alone are averaged one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pimerge
from pimerge.checkpoints.adapter_keys import is_adapter_file
from pimerge.core.errors import PimergeError

Shapes = dict[str, tuple[int, ...]]
A, B = (2, 16), (12, 2)
FACTORS: dict[str, Shapes] = {
    "cloneofsimo": {"unet:0:up": B, "unet:0:down": A},
    "nemo": {
        "model.layers.0.attn.adapter_layer.lora_kqv_adapter.linear_in.weight": A,
        "model.layers.0.attn.adapter_layer.lora_kqv_adapter.linear_out.weight": B,
    },
    "megatron": {"layers.0.qkv.adapter.linear_in.weight": A, "layers.0.qkv.adapter.linear_out.weight": B},
    "modelscope": {"layers.0.q.loramodule_A": A, "layers.0.q.loramodule_B": B},
    "attributes": {"layers.0.q.lora.A": A, "layers.0.q.lora.B": B, "embed.weight": (20, 12)},
    "control-lora": {"lora_controlnet": (1,), "input_blocks.0.weight": (12, 3), "q.up": B, "q.down": A},
    "by names and shapes": {"w_a_000": A, "w_b_000": B, "w_a_001": A, "w_b_001": B},
    "timm": {"blocks.0.attn.qkv.linear_a_q.weight": A, "blocks.0.attn.qkv.linear_b_q.weight": B},
    "vera of peft": {"base_model.model.q.vera_lambda_b": (16,), "base_model.model.q.vera_lambda_d": (4,)},
    "hra of peft": {"base_model.model.layers.0.q.hra_u": (16, 4)},
}
WEIGHTS: dict[str, Shapes] = {
    "a compressed attention": {"q_a_proj.weight": A, "q_b_proj.weight": B, "embed.weight": (9, 16)},
    "a bottleneck with biases": {"down.weight": A, "down.bias": (2,), "up.weight": (16, 2), "up.bias": (16,)},
    "rwkv": {"attn.w_lora.lora.0.weight": A, "attn.w_lora.lora.2.weight": B, "attn.w_lora.lora.2.bias": (12,)},
    "two wide layers": {"a.weight": (16, 8), "b.weight": (4, 16)},
}


def saved(path: Path, shapes: Shapes) -> Path:
    save_file({key: torch.rand(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_any_tool_are_not_averaged(name: str, tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{each}.safetensors", FACTORS[name]) for each in "ab"]
    with pytest.raises(PimergeError, match="holds factors"):
        pimerge.merge(files, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_with_similar_names_are_plain(name: str, tmp_path: Path) -> None:
    assert not is_adapter_file(saved(tmp_path / "a.safetensors", WEIGHTS[name]))
