"""Experts: made by PEFT alone, so that what pimerge reads and writes is tested against PEFT, or tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.adapters.expert import Expert
from pimerge.peft_methods import BitFitConfig, BottleneckConfig
from pimerge.tasks.examples import Batch, Examples
from pimerge.tasks.task import open_task
from tests.support.bases import LANGUAGE_MODELS, layers, model_for
from tests.support.numerics import normal
from tests.support.tasks import write_json

MakeExpert = Callable[..., Path]


PeftCase = Callable[..., tuple[PeftModel, Examples, list[Batch]]]


TARGETS = {
    "vit": ["q_proj", "v_proj"],
    "clip": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
    "gpt2-lm": ["c_attn"],
    "llama-lm": ["q_proj", "v_proj"],
    "qwen2-lm": ["q_proj", "v_proj"],
    "florence2": ["q_proj", "v_proj", "qkv"],
    "llava": ["q_proj", "v_proj"],
    "paligemma": ["q_proj", "v_proj"],
    "idefics3": ["q_proj", "v_proj"],
}


HEADS = {"vit": ["classifier"], "clip": ["classifier"], "bert": ["classifier"], "gpt2": ["score"]}


KINDS = ("ia3", "ln_tuning", "bitfit", "bottleneck", "prefix", "prompt")
"""Those that have no ΔW."""


RELATIVES: dict[str, dict[str, Any]] = {
    "loha": {"r": 2, "alpha": 3},
    "lokr": {"r": 1, "alpha": 3},
    "vera": {"r": 5, "save_projection": False, "projection_prng_key": 3},
    "randlora": {"r": 5, "randlora_alpha": 20, "save_projection": False, "projection_prng_key": 3},
    "fourierft": {"n_frequency": 6},
    "pvera": {"r": 5, "save_projection": False, "projection_prng_key": 3},
    "unilora": {"r": 3, "theta_d_length": 64, "save_indices": True},
    "waveft": {"n_frequency": 6},
    "gralora": {"r": 4, "gralora_k": 2},
    "delora": {"r": 3},
    "c3a": {"block_size": 8},
    "vblora": {"r": 2, "num_vectors": 6, "vector_length": 4},
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6},
    "shira": {"r": 2},
    "miss": {"r": 4},
    "hira": {"r": 2},
    "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 2},
    "psoft": {"r": 3, "psoft_alpha": 3},
    "deft": {"r": 2},
    "osf": {},
    "peanut": {"r": 3},
    "supertuning": {"sparsity": 0.8, "save_precomputed_indices": False},
}
"""Those whose ΔW is computed, and fields of PEFT's config."""


PROMPTS = ("prefix", "prompt")


NORMS = {
    "vit": ["layernorm_before", "layernorm_after"],
    "clip": ["layer_norm1", "layer_norm2"],
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2"],
}


OF_THE_BASE = ("hira", "oft", "boft", "hra", "psoft", "deft", "osf", "peanut", "supertuning")
"""Those whose ΔW depends on the base's weights."""


FEEDFORWARD = {"vit": ["fc2"], "clip": ["fc2"], "bert": ["intermediate.dense"], "gpt2": ["mlp.c_proj"]}
"""Of these bases; of others PEFT knows the places."""


def peft_config(kind: str, base: str, **config: Any) -> PeftConfig:
    """PEFT's config of a small expert of a kind on one of the tests' bases."""
    task = "SEQ_CLS"
    if base in LANGUAGE_MODELS:
        task = "SEQ_2_SEQ_LM" if base in ("t5", "bart") else "CAUSAL_LM"
    if kind in RELATIVES:
        made = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]
        return made(**RELATIVES[kind] | {"target_modules": TARGETS[base]} | config)
    match kind:
        case "lora":
            return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[base]} | config)
        case "ia3" if base in LANGUAGE_MODELS:
            return IA3Config(**config)
        case "ia3":
            layers = [*TARGETS[base], *FEEDFORWARD[base]]
            return IA3Config(**{"target_modules": layers, "feedforward_modules": FEEDFORWARD[base]} | config)
        case "trainable_tokens":
            fields = {"token_indices": [5, 9], "target_modules": ["word_embeddings"]} | config
            fields.pop("modules_to_save", None)  # which this kind does not have
            return TrainableTokensConfig(**fields)
        case "ln_tuning":
            return LNTuningConfig(**{"target_modules": NORMS.get(base)} | config)
        case "bitfit":
            return BitFitConfig(**config)
        case "bottleneck":
            return BottleneckConfig(**{"bottleneck_dim": 3, "activation": "gelu", "scale": 0.5} | config)
        case "prefix":
            return PrefixTuningConfig(**{"task_type": task, "num_virtual_tokens": 3} | config)
    return PromptTuningConfig(**{"task_type": task, "num_virtual_tokens": 3} | config)


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    """Make an expert with PEFT: ``make_expert(folder, base, task=None, seed=0, init_seed=0, head=True, **config)``.

    ``kind`` is LoRA if it is not given. A comes from PEFT's own init by ``init_seed``, moved a little by ``seed``; B,
    bias and head are random by ``seed``, so that ΔW is not zero: experts with one ``init_seed`` look as if trained
    from one init.
    """

    def make(
        folder: Path,
        base: Path,
        task: Path | None = None,
        *,
        seed: int = 0,
        init_seed: int = 0,
        labels: int = 2,
        head: bool = True,
        kind: str = "lora",
        **config: Any,
    ) -> Path:
        model = model_for(base, labels)
        if head and kind not in PROMPTS and base.name in HEADS:
            config.setdefault("modules_to_save", HEADS[base.name])
        torch.manual_seed(init_seed)
        peft_model = get_peft_model(model, peft_config(kind, base.name, **config))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                starts = ("lora_A", "lora_embedding_A", "ia3_", "ln_tuning_", "bitfit_", "bottleneck_down", "prompt_")
                starts += ("hada_w1", "hada_w2_a", "lokr_w2", "vera_lambda_d", "randlora_gamma")
                small = 0.02 if "lora_" in name else 0.1
                parameter.copy_(parameter + small * noise if any(start in name for start in starts) else 0.2 * noise)
        peft_model.save_pretrained(folder)
        if task is not None:
            document = json.loads((task / "task.json").read_text())
            document["data"] = {split: os.path.relpath(task / name, folder) for split, name in document["data"].items()}
            write_json(folder / "task.json", document)
        return folder

    return make


@pytest.fixture(scope="session")
def peft_case(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    bert_base: Path,
    gpt2_base: Path,
    parity_task: Path,
    text_task: Path,
) -> PeftCase:
    """``peft_case(base's name, count, dtype, **config)``: an expert's model, and the first examples of its task.

    The model is PEFT's own, its factors alone require gradients; the examples come once together and once one by one.
    """
    bases = {"vit": vit_base, "bert": bert_base, "gpt2": gpt2_base}

    def make(
        name: str, count: int, dtype: torch.dtype = torch.float32, **config: object
    ) -> tuple[PeftModel, Examples, list[Batch]]:
        base, task = bases[name], open_task(parity_task if name == "vit" else text_task)
        folder = make_expert(tmp_path_factory.mktemp("case") / "expert", base, **config)
        model = PeftModel.from_pretrained(model_for(base).to(dtype), folder).eval()
        adapter = ("lora_", "ia3_", "ln_tuning_", "bitfit_", "bottleneck_", "prompt_encoder")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in adapter))
        examples, _ = task.examples("train", task.type.load_processor(str(base), None), model.config, limit=count)
        return model, examples, [examples.batch([index]) for index in range(count)]

    return make


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of an expert's file where they lie."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    return folder


def dense_deltas(expert: Expert) -> dict[str, Tensor]:
    """Module → ΔW = s·B·A as a dense float64 matrix: the slow reference for everything that merges."""
    deltas = {}
    for name in expert.modules:
        factors = expert.factors(name)
        deltas[name] = factors.scaling * factors.B.double() @ factors.A.double()
    return deltas


PREFIX = "base_model.model."


Updates = Mapping[str, tuple[Tensor, Tensor]]


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


def layers_expert(folder: Path, seed: int = 0, **config: Any) -> Path:
    """An expert of :class:`Layers`, made by PEFT with random factors."""
    model = get_peft_model(layers(), LoraConfig(**({"r": 2, "lora_alpha": 3} | config)))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(normal(*parameter.shape, seed=100 * seed + i, scale=0.3))
    model.save_pretrained(folder)
    return set_config(folder, base_model_name_or_path="org/layers")
