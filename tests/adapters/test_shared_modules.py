"""Experts that were trained on one base with and without its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.adapters.shared_modules import refuse_names
from pimerge.core.errors import PimergeError, Problems
from tests.support.experts import raw_expert, set_config, updates_of
from tests.support.names import DECODER, IDS, adapter, logits_with, saved_base

WEIGHTS = [0.7, 0.4]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def _bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **SMALL))


CASES: dict[str, tuple[Any, list[str], str]] = {
    "llama": (_llama, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "gpt2": (_gpt2, ["c_attn"], "CAUSAL_LM"),
    "bert": (_bert, ["query", "value"], "SEQ_CLS"),
}


def _both(folder: Path, case: str, task_type: str | None, *, known: bool) -> tuple[nn.Module, list[Path]]:
    """A model with a head, and two experts: one trained on it and one on its backbone."""
    make, targets, headed = CASES[case]
    base: Any = saved_base(make(), folder / "base")
    backbone: Any = AutoModel.from_pretrained(folder / "base")
    lora = {"r": 2, "lora_alpha": 3, "target_modules": targets}
    first = adapter(base, folder / "first", LoraConfig(**lora, task_type=headed), 1)
    second = adapter(backbone, folder / "second", LoraConfig(**lora, task_type=task_type), 2)
    assert open_expert(first).modules.keys() != open_expert(second).modules.keys()
    for path in (first, second):
        set_config(path, base_model_name_or_path=str(folder / "base") if known else "org/not-here")
    return base, [first, second]


def _sum(base: Any, paths: list[Path], classes: list[Any], weights: list[float]) -> torch.Tensor:
    """Logits of W0 + Σ w_n ΔW_n, where PEFT merges each expert into the model of its own class."""
    from copy import deepcopy

    from peft import PeftModel

    result = deepcopy(base)
    inside = getattr(result, result.base_model_prefix)
    start = {name: value.clone() for name, value in inside.state_dict().items()}
    summed = {name: value.clone() for name, value in start.items()}
    for path, model, weight in zip(paths, classes, weights, strict=True):
        merged: Any = PeftModel.from_pretrained(deepcopy(model), str(path)).merge_and_unload()
        merged = getattr(merged, result.base_model_prefix, merged)
        for name, value in merged.state_dict().items():
            summed[name] += weight * (value - start[name]) if value.is_floating_point() else 0
    inside.load_state_dict(summed)
    with torch.no_grad():
        logits: torch.Tensor = result.eval()(**IDS).logits
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("known", [True, False], ids=["base here", "base elsewhere"])
def test_experts_of_a_model_and_of_its_backbone_are_summed(
    tmp_path: Path, case: str, task_type: str | None, known: bool
) -> None:
    base, paths = _both(tmp_path, case, task_type, known=known)
    backbone = AutoModel.from_pretrained(tmp_path / "base")
    for order in (1, -1):
        out = pimerge.merge(
            paths[::order], method="interpolated", weights=WEIGHTS[::order], head="none", output=tmp_path / str(order)
        ).path
        assert out is not None
        merged = open_expert(out)
        assert merged.modules.keys() == open_expert(paths[0]).modules.keys()
        assert merged.config["task_type"] != "FEATURE_EXTRACTION"
        expected = _sum(base, paths, [base, backbone], WEIGHTS)
        torch.testing.assert_close(logits_with(base, out), expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_that_was_saved_alone_gives_the_prefix(tmp_path: Path) -> None:
    base, paths = _both(tmp_path, "bert", None, known=True)
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    out = pimerge.merge(paths, method="interpolated", weights=WEIGHTS, head="none", output=tmp_path / "out").path
    assert out is not None
    expected = _sum(base, paths, [base, AutoModel.from_pretrained(tmp_path / "base")], WEIGHTS)
    torch.testing.assert_close(logits_with(base, out), expected, rtol=1e-4, atol=1e-5)


def test_into_a_base_both_are_the_same_modules(tmp_path: Path) -> None:
    base, paths = _both(tmp_path, "llama", None, known=True)
    out = pimerge.merge(
        paths, method="interpolated", weights=WEIGHTS, head="none", into=tmp_path / "base", output=tmp_path / "out"
    ).path
    expected = _sum(base, paths, [base, AutoModel.from_pretrained(tmp_path / "base")], WEIGHTS)
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(out).eval()(**IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kinds_without_an_update_are_matched(tmp_path: Path) -> None:
    base: Any = saved_base(_llama(), tmp_path / "base")
    backbone: Any = AutoModel.from_pretrained(tmp_path / "base")
    config: PeftConfig = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    headed = [adapter(base, tmp_path / name, config, seed) for seed, name in enumerate("ab")]
    inner = adapter(backbone, tmp_path / "inner", config, 1)
    plain = pimerge.merge(headed, output=tmp_path / "plain").path
    mixed = pimerge.merge([headed[0], inner], output=tmp_path / "mixed").path
    assert plain is not None
    assert mixed is not None
    torch.testing.assert_close(logits_with(base, mixed), logits_with(base, plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("vision_model.layers.0.q", "layers.0.q"),  # there may be a text_model with the same layers
        ("actor.model.layers.0.q", "model.layers.0.q"),  # a wrapper's name, not a backbone's
        ("net.layers.0.q", "layers.0.q"),
        ("model.layers.0.self_attn.q", "blocks.0.attn.q"),
        ("model.language_model.layers.0.q", "layers.0.q"),
    ],
)
def test_names_that_may_be_of_other_modules_are_refused(tmp_path: Path, first: str, second: str) -> None:
    paths = [raw_expert(tmp_path / str(n), updates_of({name: (4, 2, 4)})) for n, name in enumerate((first, second))]
    with pytest.raises(PimergeError, match="share no module"):
        pimerge.merge(paths, output=tmp_path / "out")


def test_tied_heads_and_stacked_experts_are_not_named_as_missing(tmp_path: Path) -> None:
    tensors = {"encoder.q.weight": torch.zeros(4, 4), "encoder.mlp.experts.up": torch.zeros(2, 4, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    experts = [
        open_expert(raw_expert(tmp_path / str(i), updates_of({n: (4, 2, 4)}), base_model_name_or_path=str(tmp_path)))
        for i, n in enumerate(["lm_head", "encoder.mlp.experts.0.up", "encoder.actor.q"])
    ]
    problems = Problems()
    assert not refuse_names(experts[:2], problems)
    assert refuse_names(experts, problems)
    assert "'encoder.actor.q', which the base" in problems.found[0].message
