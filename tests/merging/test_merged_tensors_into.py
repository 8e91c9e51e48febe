"""Experts without ΔW merged into a checkpoint, against PEFT's ``merge_and_unload``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LNTuningConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from pimerge.core.errors import PimergeError
from pimerge.peft_methods.bitfit import BitFitConfig
from pimerge.peft_methods.bottleneck import BottleneckConfig
from tests.support.cli import Shell
from tests.support.into_cases import SIZES, adapted, filled, llama, merged_into, opened, outputs, t5


def bert(folder: Path) -> Any:
    """A BERT with a classifier."""
    model = filled(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=2)))
    model.save_pretrained(folder)
    return model


def gpt2(folder: Path) -> Any:
    """A GPT-2, whose layers store their weights (d_in × d_out)."""
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = filled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    model.save_pretrained(folder)
    return model


def convnext(folder: Path) -> Any:
    """A ConvNext, with grouped convolutions."""
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=8)
    model = filled(transformers.ConvNextForImageClassification(config))
    model.save_pretrained(folder)
    return model


CASES: dict[str, tuple[Callable[[Path], Any], PeftConfig]] = {
    "ia3-llama": (llama, IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-tied-head": (llama, IA3Config(target_modules=["lm_head", "v_proj"], feedforward_modules=[])),
    "ia3-bert": (bert, IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])),
    "ia3-bert-classifier": (
        bert,
        IA3Config(target_modules=["value"], feedforward_modules=[], modules_to_save=["classifier"]),
    ),
    "ia3-gpt2": (
        gpt2,
        IA3Config(target_modules=["c_attn", "c_fc", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True),
    ),
    "ia3-t5": (t5, IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3-conv": (
        convnext,
        IA3Config(target_modules=["dwconv", "patch_embeddings", "pwconv1"], feedforward_modules=["patch_embeddings"]),
    ),
    "ia3-grouped-inputs": (convnext, IA3Config(target_modules=["dwconv"], feedforward_modules=["dwconv"])),
    "ln-llama": (llama, LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "ln-bert": (bert, LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"])),
    "bitfit-bert": (bert, BitFitConfig(target_modules=["query", "output.dense", "LayerNorm"])),
    "bitfit-gpt2": (gpt2, BitFitConfig(target_modules=["c_attn", "c_proj"])),
}
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def answers(name: str, model: Any) -> torch.Tensor:
    """A model's outputs."""
    return outputs(model, pixel_values=PIXELS) if CASES[name][0] is convnext else outputs(model)


@pytest.mark.parametrize("name", CASES)
def test_one_expert_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    base = make(tmp_path / "base") if name != "ia3-tied-head" else llama(tmp_path / "base", tie_word_embeddings=True)
    expert = adapted(base, config, tmp_path / "a", tmp_path / "base", save_embedding_layers=False)
    wanted = answers(name, expert)
    assert (wanted - answers(name, base)).abs().max() > 1e-3
    merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(answers(name, opened(tmp_path / "out", base)), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["ia3-llama", "ia3-gpt2", "ln-bert", "bitfit-bert"])
def test_two_experts_with_weights(name: str, tmp_path: Path) -> None:
    """The reference is PEFT's model of an adapter that holds φ0 + Σ w (φ − φ0)."""
    make, config = CASES[name]
    base = make(tmp_path / "base")
    models = [adapted(base, config, tmp_path / q, tmp_path / "base", seed=seed) for seed, q in enumerate("ab")]
    merged_into(
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "base",
        tmp_path / "out",
        method="interpolated",
        weights=[0.7, 0.4],
        target=tmp_path / "b",
    )
    a, b = (load_file(tmp_path / q / "adapter_model.safetensors") for q in "ab")
    own = dict(base.named_parameters())
    sums = {}
    for key in a:
        slots = {".ln_tuning_layers.": ".", ".bitfit_bias": ".bias"}
        parameter = key.removeprefix("base_model.model.")
        for slot, end in slots.items():
            parameter = parameter.replace(slot, end)
        zero = own[parameter].detach() if parameter in own else torch.ones_like(a[key])
        sums[key] = b[key] if "classifier" in key else zero + 0.7 * (a[key] - zero) + 0.4 * (b[key] - zero)
    save_file(sums, tmp_path / "b" / "adapter_model.safetensors", {"format": "pt"})
    wanted = PeftModel.from_pretrained(base, tmp_path / "b").merge_and_unload()
    torch.testing.assert_close(outputs(opened(tmp_path / "out", base)), outputs(wanted), rtol=1e-5, atol=2e-5)
    assert len(models) == 2
    assert json.loads((tmp_path / "out" / "coefficients.json").read_text())["weights"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "in front of the embedded text"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "keys and values"),
        (BottleneckConfig(target_modules=["q_proj"], bottleneck_dim=2), "a nonlinearity"),
    ],
)
def test_kinds_that_no_weight_can_hold(config: PeftConfig, why: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapted(base, config, tmp_path / "a", tmp_path / "base")
    with pytest.raises(PimergeError, match=rf"cannot be merged into a checkpoint: .*{why}[\s\S]*leave out --into"):
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_of_another_base_and_the_command(tmp_path: Path, shell: Shell) -> None:
    base = llama(tmp_path / "base")
    adapted(base, CASES["ia3-llama"][1], tmp_path / "a", tmp_path / "base")
    llama(tmp_path / "other", intermediate_size=32)
    given = ("merge", tmp_path / "a", "--ranking", "none.json")
    result = shell(*given, "--into", tmp_path / "other", "--base", tmp_path / "other", "-o", "out")
    assert (result.code, Path("out").exists()) == (3, False)
    assert "down_proj.weight' is (16, 32), but the adapter scales 24 numbers" in result.err
    result = shell(*given, "--into", tmp_path / "base", "-o", "out")
    assert result.code == 0, result.err
    assert "a full checkpoint" in result.err
    result = shell(*given, "--into", tmp_path / "base", "-o", "dry", "--dry-run")
    assert (result.code, Path("dry").exists()) == (0, False)
