"""Tiny mixtures of experts from configs, and adapters of them that PEFT makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.experts import set_config

EXPERTS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10},
    ),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 6, "head_dim": 4}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "gpt-oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 4}),
    "llama4": (
        "Llama4",
        {"num_local_experts": EXPERTS, "head_dim": 4, "intermediate_size_mlp": 10, "interleave_moe_layer_step": 1},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 6,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "q_lora_rank": 4,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 2,
            "v_head_dim": 4,
        },
    ),
}
MIXTURES = tuple(_OWN)
MakeModel = Callable[[], nn.Module]


def mixture(name: str) -> Any:
    """A mixture of experts with random weights."""
    prefix, fields = _OWN[name]
    top = {"num_experts_per_tok": 1 if name == "llama4" else 2}
    config = getattr(transformers, prefix + ("TextConfig" if name == "llama4" else "Config"))(**_SIZES, **top, **fields)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    _randomise(model.named_parameters(), seed=0)
    return model.eval()


def experts_name(name: str) -> str:
    """The ending of the module that holds a mixture's experts."""
    return "feed_forward.experts" if name == "llama4" else "mlp.experts"


def save_adapter(base: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of a base with random factors, made by PEFT."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 2, "lora_alpha": 3} | config))
    _randomise(((name, each) for name, each in model.named_parameters() if each.requires_grad), seed)
    model.save_pretrained(folder)
    return set_config(folder, base_model_name_or_path="org/mixture")


def updates_by_peft(base: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """Parameter → ΔW, as PEFT merges an adapter into the base."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))
    return changes(base, model.merge_and_unload().state_dict())


def changes(base: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter → its change, for those that changed."""
    found = {name: weights[name].double() - before.double() for name, before in base.state_dict().items()}
    return {name: change for name, change in found.items() if change.abs().max() > 0}


def _randomise(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters, key=lambda each: each[0]):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


_LAYERS = {"mixtral": ("w1", "w3", "w2", "block_sparse_moe")}


def save_adapter_by_layer(
    base: Any, name: str, folder: Path, seed: int, layers: Sequence[str] = (), **config: Any
) -> dict[str, Tensor]:
    """An adapter as it was made before the experts' weights were stacked, with a LoRA for each layer of each expert.

    It also adapts the router, and the layers of shared experts.

    Args:
        layers: the layers of the experts that are adapted, as today's parts of them: gate, up, down.

    Returns:
        parameter → ΔW, computed densely from the factors.
    """
    rank, alpha = 2, 3
    gate, up, down, block = _LAYERS.get(name, ("gate_proj", "up_proj", "down_proj", "mlp"))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def update(module: str, like: Tensor) -> Tensor:
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, like.shape[1]), (like.shape[0], rank)))
        old = module.replace(".mlp.", f".{block}.")
        tensors[f"base_model.model.{old}.lora_A.weight"], tensors[f"base_model.model.{old}.lora_B.weight"] = A, B
        return alpha / rank * B.double() @ A.double()

    wanted = set(layers or ("gate", "up", "down"))
    for parameter, weight in base.state_dict().items():
        module, _, leaf = parameter.rpartition(".")
        if leaf == "gate_up_proj":
            halves = weight.chunk(2, dim=1)
            deltas[parameter] = torch.zeros_like(weight, dtype=torch.float64)
            for index in range(EXPERTS):
                rows = [
                    update(f"{module}.{index}.{layer}", half[index])
                    if part in wanted
                    else torch.zeros_like(half[index])
                    for part, layer, half in zip(("gate", "up"), (gate, up), halves, strict=True)
                ]
                deltas[parameter][index] = torch.cat(rows)
        elif leaf == "down_proj" and "down" in wanted:
            matrices = [update(f"{module}.{index}.{down}", weight[index]) for index in range(EXPERTS)]
            deltas[parameter] = torch.stack(matrices)
        elif weight.dim() == 2 and module.endswith(("mlp.gate", "q_proj", ".gate_proj", ".up_proj", ".down_proj")):
            deltas[parameter] = update(module, weight)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/mixture"}
    targets = ["q_proj", "gate", *([gate] if "gate" in wanted else []), *([up] if "up" in wanted else []), down]
    document = {**fields, "r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return deltas
