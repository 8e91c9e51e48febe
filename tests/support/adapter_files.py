"""Files of adapters as other tools write them, and ΔW by each tool's own formula, entry by entry where it is short."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.numerics import normal

Tensors = dict[str, Tensor]
PAIRS = (  # A, B
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
    (".lora_A.other.weight", ".lora_B.other.weight"),
)
MLX_SCALE = 20.0


def low_rank(
    stem: str, rank: int, seed: int, *, alpha: float | None = None, pair: int = 0, kernel: int = 0, dtype: Any = None
) -> Tensors:
    """A LoRA of a layer with 6 outputs and 5 inputs."""
    down, up = PAIRS[pair]
    square = (kernel, kernel) if kernel else ()
    found = {
        stem + down: normal(rank, 5, *square, seed=seed),
        stem + up: normal(6, rank, *((1, 1) if kernel else ()), seed=seed + 1),
    }
    found = {key: tensor.to(dtype or torch.float32) for key, tensor in found.items()}
    return found | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})


def kohya(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """kohya: a text encoder, layers of a UNet with and without alpha, and a convolution."""
    return {
        **low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", rank, seed, alpha=alpha, dtype=dtype),
        **low_rank("lora_unet_mid_block_attentions_0_proj_in", rank, seed + 10, dtype=dtype),
        **low_rank("lora_unet_down_blocks_0_resnets_0_conv1", 1, seed + 20, alpha=0.5, kernel=3, dtype=dtype),
        **low_rank("lora_unet_mid_block_attentions_0_proj_out", 2, seed + 30, alpha=4.0, kernel=1, dtype=dtype),
    }


def lycoris(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """LyCORIS: every form of LoHa, LoKr, LoCon, full updates, norms and biases, beside a LoRA."""
    n, shapes = (
        iter(range(seed, seed + 1000)),
        {
            "loha": {"hada_w1_a": (6, rank), "hada_w1_b": (rank, 5), "hada_w2_a": (6, rank), "hada_w2_b": (rank, 5)},
            "loha_conv": {"hada_w1_a": (6, 1), "hada_w1_b": (1, 45), "hada_w2_a": (6, 1), "hada_w2_b": (1, 45)},
            "loha_tucker": {
                "hada_w1_a": (2, 6),
                "hada_w1_b": (2, 5),
                "hada_t1": (2, 2, 3, 3),
                "hada_w2_a": (2, 6),
                "hada_w2_b": (2, 5),
                "hada_t2": (2, 2, 3, 3),
            },
            "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, rank), "lokr_w2_b": (rank, 2)},
            "lokr_both": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (4, rank), "lokr_w2_b": (rank, 5)},
            "lokr_whole": {"lokr_w1": (2, 3), "lokr_w2": (4, 2)},
            "lokr_conv": {"lokr_w1": (2, 1), "lokr_w2": (3, 5, 3, 3)},
            "lokr_tucker": {"lokr_w1": (2, 1), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 5)},
            "locon": {
                "lora_up.weight": (6, rank, 1, 1),
                "lora_mid.weight": (rank, rank, 3, 3),
                "lora_down.weight": (rank, 5, 1, 1),
            },
            "full": {"diff": (6, 5), "diff_b": (6,)},
            "full_conv": {"diff": (3, 2, 3, 3)},
            "norm": {"w_norm": (6,), "b_norm": (6,)},
            "norm_diff": {"diff": (6,)},
            "only_bias": {"diff_b": (6,)},
        },
    )
    found = low_rank("lora_unet_plain", rank, seed + 5000, alpha=alpha) | {
        "lora_unet_plain.diff_b": normal(6, seed=seed)
    }
    for name, slots in shapes.items():
        found |= {f"lora_unet_{name}.{slot}": normal(*shape, seed=next(n), scale=0.5) for slot, shape in slots.items()}
        if name.startswith("lo"):
            found[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return {key: tensor.to(dtype) if dtype and not key.endswith(".alpha") else tensor for key, tensor in found.items()}


def diffusers(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """diffusers today: a UNet with a convolution, and a text encoder; the scaling is 1."""
    return {
        **low_rank("unet.mid_block.attentions.0.proj_in", rank, seed, pair=1, dtype=dtype),
        **low_rank("unet.down_blocks.0.resnets.0.conv1", rank, seed + 10, pair=1, kernel=3, dtype=dtype),
        **low_rank("text_encoder.text_model.encoder.layers.0.mlp.fc1", rank, seed + 20, pair=1, dtype=dtype),
    }


def old_diffusers(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """diffusers before it used PEFT."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    return {
        **low_rank(f"unet.{block}.to_q", rank, seed, pair=5, dtype=dtype),
        **low_rank(f"unet.{block}.to_out", rank, seed + 10, pair=5, dtype=dtype),
        **low_rank("unet.mid_block.attentions.0.proj_in", rank, seed + 20, pair=4, dtype=dtype),
        **low_rank(f"{layer}.q_proj", rank, seed + 30, pair=6, dtype=dtype),
        **low_rank("unet.add_embedding.linear_1", rank, seed + 40, pair=8, dtype=dtype),
    }


def xlabs(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """XLabs' Flux LoRA, whose attention processors number their updates."""
    return low_rank("double_blocks.0.processor.qkv_lora1", rank, seed, pair=7, dtype=dtype)


def ai_toolkit(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """ai-toolkit: LoRA with and without alpha, of several ranks, and LoKr."""
    lokr = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 2)}
    return {
        **low_rank("diffusion_model.blocks.0.attn.to_q", rank, seed, pair=1, dtype=dtype),
        **low_rank("diffusion_model.blocks.0.attn.to_k", 1, seed + 10, pair=1, dtype=dtype),
        **low_rank("diffusion_model.blocks.0.attn.to_v", rank, seed + 20, pair=1, alpha=alpha, dtype=dtype),
        **{
            f"diffusion_model.blocks.0.ff.{slot}": normal(*s, seed=seed + 30 + i)
            for i, (slot, s) in enumerate(lokr.items())
        },
        "diffusion_model.blocks.0.ff.alpha": torch.tensor(2.0),
    }


def mlx(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """mlx-lm: transposed factors; the scale is in the config."""
    found = {}
    for place, name in enumerate(("q_proj", "v_proj")):
        stem = f"model.layers.0.self_attn.{name}"
        found[f"{stem}.lora_a"] = normal(5, rank, seed=seed + 10 * place).to(dtype or torch.float32)
        found[f"{stem}.lora_b"] = normal(rank, 6, seed=seed + 10 * place + 1).to(dtype or torch.float32)
    return found


def split(seed: int, rank: int = 2, alpha: float = 3.0, dtype: Any = None) -> Tensors:
    """sd-scripts with split_qkv: the rows of a layer in three parts of different heights, beside a plain LoRA."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    found = {f"{stem}.alpha": torch.tensor(alpha)}
    for part, rows in enumerate((4, 4, 7)):
        found[f"{stem}.lora_down.{part}.weight"] = normal(rank, 5, seed=seed + part).to(dtype or torch.float32)
        found[f"{stem}.lora_up.{part}.weight"] = normal(rows, rank, seed=seed + 10 + part).to(dtype or torch.float32)
    return found | low_rank("lora_unet_double_blocks_0_img_attn_proj", rank, seed + 20, alpha=alpha, dtype=dtype)


BUILDERS = {
    "kohya": kohya,
    "split": split,
    "lycoris": lycoris,
    "diffusers": diffusers,
    "old_diffusers": old_diffusers,
    "xlabs": xlabs,
    "ai-toolkit": ai_toolkit,
    "mlx": mlx,
}
FORMAT_OF = {name: name for name in BUILDERS} | {"old_diffusers": "diffusers", "xlabs": "diffusers", "split": "kohya"}


def written(path: Path, builder: str, seed: int, *, metadata: Mapping[str, str] | None = None, **fields: Any) -> Path:
    """Write a file, for mlx a folder with its config."""
    tensors = BUILDERS[builder](seed, **fields)
    if builder == "mlx":
        folder = path.with_suffix("")
        folder.mkdir()
        save_file(tensors, folder / "adapters.safetensors")
        config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": MLX_SCALE}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    return path


def tensors_in(path: Path) -> Tensors:
    """The tensors of a file, or of the only file in a folder."""
    found: Tensors = load_file(path if path.is_file() else next(path.glob("*.safetensors")))
    return found


def metadata_in(path: Path) -> dict[str, str]:
    with safe_open(path if path.is_file() else next(path.glob("*.safetensors")), framework="pt") as file:
        return dict(file.metadata() or {})


def deltas_in(path: Path) -> Tensors:
    """Stem → ΔW as the tools compute it, with a kernel flattened; the update of a bias is under ``stem + ':bias'``."""
    tensors = {key: tensor.double() for key, tensor in tensors_in(path).items()}
    if any(key.endswith(".lora_a") for key in tensors):
        scale = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        stems = sorted(key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a"))
        return {stem: scale * (tensors[f"{stem}.lora_a"] @ tensors[f"{stem}.lora_b"]).T for stem in stems}
    found: Tensors = {}
    for key, tensor in tensors.items():
        for down, up in PAIRS:
            other = down == ".down.weight" and re.search(r"[._]lora(_linear_layer)?\.down\.weight$", key)
            if (
                key.endswith(down)
                and not other
                and (stem := key.removesuffix(down)) + up in tensors
                and stem not in found
            ):
                found[stem] = _low_rank(tensors, stem, tensor, tensors[stem + up])
        if key.endswith(".lora_down.0.weight"):
            stem = key.removesuffix(".lora_down.0.weight")
            parts = [(f"{stem}.lora_up.{n}.weight", f"{stem}.lora_down.{n}.weight") for n in range(3)]
            found[stem] = _scale(tensors, stem, tensor) * torch.cat([tensors[up] @ tensors[down] for up, down in parts])
        stem, _, slot = key.rpartition(".")
        if slot == "hada_w1_a":
            found[stem] = _scale(tensors, stem, tensors[f"{stem}.hada_w1_b"]) * _hadamard(tensors, stem)
        elif slot in ("lokr_w1", "lokr_w1_a"):
            found[stem] = _kronecker(tensors, stem)
        elif slot in ("diff", "w_norm"):
            found[stem] = tensor.reshape(len(tensor), -1)
        elif slot in ("diff_b", "b_norm"):
            found[f"{stem}:bias"] = tensor
    return found


def _scale(tensors: Tensors, stem: str, down: Tensor) -> float:
    """alpha / dim; without an alpha 1."""
    alpha = tensors.get(f"{stem}.alpha")
    return 1.0 if alpha is None else float(alpha) / len(down)


def _low_rank(tensors: Tensors, stem: str, down: Tensor, up: Tensor) -> Tensor:
    scale, mid = _scale(tensors, stem, down), tensors.get(f"{stem}.lora_mid.weight")
    up, flat = up.reshape(len(up), -1), down.reshape(len(down), -1)
    if mid is None:
        return scale * up @ flat
    kernels = [up @ mid[..., x, y] @ flat for x in range(mid.shape[2]) for y in range(mid.shape[3])]
    return scale * torch.stack(kernels, -1).reshape(len(up), -1)


def _product(tensors: Tensors, a: str, b: str, core: str) -> Tensor:
    left, right, middle = tensors[a], tensors[b], tensors.get(core)
    if middle is None:
        return left @ right.reshape(len(right), -1)
    kernels = [left.T @ middle[..., x, y] @ right for x in range(middle.shape[2]) for y in range(middle.shape[3])]
    return torch.stack(kernels, -1).reshape(left.shape[1], -1)


def _hadamard(tensors: Tensors, stem: str) -> Tensor:
    return _product(tensors, f"{stem}.hada_w1_a", f"{stem}.hada_w1_b", f"{stem}.hada_t1") * _product(
        tensors, f"{stem}.hada_w2_a", f"{stem}.hada_w2_b", f"{stem}.hada_t2"
    )


def _kronecker(tensors: Tensors, stem: str) -> Tensor:
    scale, factors = 1.0, []
    for number in (1, 2):
        name = f"{stem}.lokr_w{number}"
        if name in tensors:
            factors.append(tensors[name].reshape(len(tensors[name]), -1))
        else:
            factors.append(_product(tensors, f"{name}_a", f"{name}_b", f"{stem}.lokr_t{number}"))
            scale = _scale(tensors, stem, tensors[f"{name}_b"])
    first, second = factors
    rows = [torch.cat([entry * second for entry in row], 1) for row in first]
    return scale * torch.cat(rows)
