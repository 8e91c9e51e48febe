"""Adapters whose modules have the names of another program or of another version of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.adapters.peft_folder import peft_folder
from pimerge.core.errors import PimergeError
from pimerge.peft_methods import BitFitConfig
from tests.support.names import DECODER, adapter, logits_of_sum, logits_with, rekeyed, saved_base

WEIGHTS = [0.7, 0.4]
QV = ["q_proj", "v_proj"]
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return saved_base(LlamaForCausalLM(LlamaConfig(**DECODER)), folder / "base"), folder


def after(part: str, name: str) -> Rename:
    """Put a name into keys after a part of them."""
    return lambda key: re.sub(rf"({part})\.", rf"\1.{name}.", key, count=1)


WRAPPED: dict[str, Rename] = {
    "compiled": after("base_model.model", "_orig_mod"),
    "compiled inside": after("base_model.model.model", "_orig_mod"),
    "fsdp": after("base_model.model.model", "_fsdp_wrapped_module"),
    "checkpointed": after(r"layers\.\d+", "_checkpoint_wrapped_module"),
    "fsdp and checkpointed": after(r"layers\.\d+", "_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "ddp": after("base_model.model", "module"),
    "ddp outside": lambda key: f"module.{key}",
    "ddp and compiled outside": lambda key: f"_orig_mod.module.{key}",
    "deepspeed": after("base_model.model.model", "module"),
    "lightning": lambda key: f"model.{key}",
    "fabric": after("base_model.model", "_forward_module.module"),
    "unknown parallelism": after(r"layers\.\d+", "_tp_wrapped_module"),
    "strategy": after("base_model.model", "_ddp_module"),
    "engine": after("base_model.model", "engine.module"),
    "engine outside": lambda key: f"engine.module.{key}",
    "peft in peft": after("base_model.model", "base_model.model"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "part of the prefix": lambda key: key.removeprefix("base_model."),
    "backbone": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "text of a multimodal model": after("base_model.model.model", "language_model"),
    "adapter name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
    "another adapter name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.my-task.", key),
    "everything": lambda key: "module." + re.sub(r"(lora_[AB])\.", r"\1.sft.", after(r"\d", "_orig_mod")(key)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_expert_is_the_plain_one(tmp_path: Path, llama: tuple[nn.Module, Path], how: str) -> None:
    base, folder = llama
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=QV,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 3},
        task_type="CAUSAL_LM",
    )
    first, second = (adapter(base, tmp_path / name, lora, seed) for seed, name in enumerate("ab"))
    for path in (first, second):
        rekeyed(path, str, base_model_name_or_path=str(folder / "base"))
    wrapped = rekeyed(second, WRAPPED[how], tmp_path / "wrapped")
    assert open_expert(wrapped).modules == open_expert(second).modules
    out = pimerge.merge([first, wrapped], method="interpolated", weights=WEIGHTS, output=tmp_path / "out").path
    assert out is not None
    expected = logits_of_sum(base, [first, second], WEIGHTS)
    torch.testing.assert_close(logits_with(base, out), expected, rtol=1e-4, atol=1e-5)


def test_names_are_read_without_the_base_where_one_reading_is_possible(tmp_path: Path, llama: Any) -> None:
    base, _ = llama
    plain = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=QV))
    rekeyed(plain, str, base_model_name_or_path="org/not-here")
    expected = open_expert(plain).modules
    for how in (
        "compiled",
        "fsdp and checkpointed",
        "ddp",
        "lightning",
        "engine",
        "strategy",
        "peft in peft",
        "no prefix",
        "adapter name",
    ):
        wrapped = rekeyed(plain, WRAPPED[how], tmp_path / how.replace(" ", "-"))
        assert open_expert(wrapped).modules == expected


class Wrapper(nn.Module):
    """A model that really has modules named like wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"_orig_mod": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def test_a_name_that_the_base_has_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.support.experts import raw_expert, updates_of

    save_file(Wrapper().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    updates = updates_of({"module._orig_mod": (4, 2, 4), "module.head": (2, 1, 4)})
    expert = open_expert(raw_expert(tmp_path / "e", updates, base_model_name_or_path=str(tmp_path)))
    assert list(expert.modules) == ["module._orig_mod", "module.head"]
    assert not expert.renamed


@pytest.mark.parametrize("kind", ["lora", "ia3", "ln_tuning"])
@pytest.mark.parametrize("how", [after("base_model.model", "actor"), after(r"layers\.\d+", "_inner")])
def test_an_unknown_wrapper_is_refused_by_the_modules_that_the_base_lacks(
    tmp_path: Path, llama: Any, kind: str, how: Rename
) -> None:
    base, folder = llama
    config = LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM") if kind == "lora" else CONFIGS[kind]
    first, second = (adapter(base, tmp_path / name, config, seed) for seed, name in enumerate("ab"))
    for path in (first, second):
        rekeyed(path, str, base_model_name_or_path=str(folder / "base"))
    wrapped = rekeyed(second, how, tmp_path / "wrapped")
    with pytest.raises(PimergeError, match=r"'wrapped' adapts '.*(actor|_inner).*, which .* does not have"):
        pimerge.merge([first, wrapped], target=first, output=tmp_path / "out")


def test_two_keys_of_one_tensor_are_refused_by_name(tmp_path: Path, llama: Any) -> None:
    base, _ = llama
    from tests.support.experts import edit_tensors

    path = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=QV))

    def twice(tensors: dict[str, Tensor]) -> None:
        key = next(iter(tensors))
        tensors[key.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors[key] + 1

    edit_tensors(path, twice)
    with pytest.raises(PimergeError, match=r"_orig_mod.* and base_model\.model\.model.* are both the tensor"):
        open_expert(path)


def test_several_adapters_in_one_file_are_refused_by_name(tmp_path: Path, llama: Any) -> None:
    base, _ = llama
    path = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=QV))
    rekeyed(path, lambda key: key.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two."))
    with pytest.raises(PimergeError, match="several adapters: one, two"):
        open_expert(path)


CONFIGS: dict[str, PeftConfig] = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(target_modules=QV, r=2, alpha=3, task_type="CAUSAL_LM"),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(target_modules=QV, r=2, use_dora=True, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, task_type="CAUSAL_LM"),
    "head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["checkpointed", "ddp outside", "no prefix", "engine outside", "unknown parallelism"])
def test_every_kind_is_read_without_its_wrappers(tmp_path: Path, llama: Any, kind: str, how: str) -> None:
    base, folder = llama
    first, second = (adapter(base, tmp_path / name, CONFIGS[kind], seed) for seed, name in enumerate("ab"))
    for path in (first, second):
        rekeyed(path, str, base_model_name_or_path=str(folder / "base"))
    wrapped = rekeyed(second, WRAPPED[how], tmp_path / "wrapped")
    results = []
    for name, other in (("plain", second), ("unwrapped", wrapped)):
        out = pimerge.merge([first, other], target=other, base=folder / "base", output=tmp_path / name).path
        assert out is not None
        results.append(logits_with(base, out))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_the_state_dict_of_peft_s_model_is_an_adapter(tmp_path: Path) -> None:
    """With an adapter's name in each key, also in those of the head, and the base's own head beside it."""
    from peft import get_peft_model
    from safetensors.torch import save_file

    base = saved_base(BertForSequenceClassification(_bert()), tmp_path / "base")
    for kind, config in {
        "lora": LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        "bitfit": BitFitConfig(modules_to_save=["classifier"]),
    }.items():
        path = adapter(base, tmp_path / kind, config)
        model = get_peft_model(base, config)
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
        wanted = ("lora_", "bitfit_bias", "modules_to_save", "original_module")
        state = {key: value.clone() for key, value in model.state_dict().items() if any(part in key for part in wanted)}
        expected = open_expert(path)
        raw = rekeyed(path, str, tmp_path / f"raw-{kind}")
        save_file(state, raw / "adapter_model.safetensors", {"format": "pt"})
        found = open_expert(raw)
        assert any(".default" in key for key in state)
        assert found.head.keys() == expected.head.keys()
        assert (found.modules, found.tensor_sets) == (expected.modules, expected.tensor_sets)
        base = model.unload()


def _bert() -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)


def test_the_backbone_s_prefix_is_kept_where_only_the_base_s_file_lacks_it(tmp_path: Path) -> None:
    saved_base(BertModel(_bert()), tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    path = adapter(model, tmp_path / "a", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert not open_expert(path).renamed


@pytest.mark.parametrize("how", ["compiled", "ddp outside", "another adapter name", "backbone"])
def test_peft_loads_a_wrapped_expert_as_the_plain_one(tmp_path: Path, llama: tuple[nn.Module, Path], how: str) -> None:
    base, folder = llama
    path = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM"))
    rekeyed(path, str, base_model_name_or_path=str(folder / "base"))
    with peft_folder(open_expert(rekeyed(path, WRAPPED[how], tmp_path / "wrapped"))) as copy:
        torch.testing.assert_close(logits_with(base, copy), logits_with(base, path), rtol=0, atol=0)
