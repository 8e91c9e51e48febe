"""Quantised checkpoints are refused with what helps, or dequantised as bitsandbytes and transformers do."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.checkpoints.dequantised import dequantised
from pimerge.core.errors import PimergeError
from tests.support.checkpoints import set_checkpoint_config
from tests.support.into_cases import adapted, filled, llama, merged_into, outputs

pytest.importorskip("bitsandbytes")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
CASES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


def quantised(model: Any, folder: Path, **config: Any) -> Path:
    """Save a model as bitsandbytes quantises it."""
    model.save_pretrained(folder / "whole")
    kind = transformers.BitsAndBytesConfig(**config)
    small = type(model).from_pretrained(folder / "whole", quantization_config=kind, device_map="cpu")
    small.save_pretrained(folder / "small", max_shard_size="20KB")
    return folder / "small"


def dequantised_by_transformers(folder: Path, kind: Any) -> Any:
    """The model that transformers dequantises."""
    return kind.from_pretrained(folder, device_map="cpu").dequantize().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_merged_into_the_dequantised_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **SIZES)
    folder = quantised(base.to(dtype), tmp_path, **CASES[name])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted(base.float(), config, tmp_path / "a", folder)
    with pytest.raises(PimergeError, match=r"is quantised[\s\S]*unquantised original[\s\S]*--dequantize"):
        merged_into(tmp_path / "a", folder, tmp_path / "out")
    merged_into(tmp_path / "a", folder, tmp_path / "out", dequantize=True)
    whole = dequantised_by_transformers(folder, type(base))
    assert whole.model.layers[0].self_attn.q_proj.weight.dtype == dtype
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(found.config, "quantization_config")
    mine, theirs = found.state_dict(), whole.state_dict()
    changed = {key for key in mine if not torch.equal(mine[key], theirs[key])}
    assert changed == {key for key in mine if "q_proj" in key or "down_proj" in key}
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(whole).float(), tmp_path / "a").merge_and_unload())
    close = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs(found.float()), wanted, rtol=close, atol=close)
    stored = {key for file in (tmp_path / "out").glob("*.safetensors") for key in load_file(file)}
    assert stored == set(base.state_dict())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored


@pytest.mark.parametrize("name", ["nested", "8 bits"])
def test_transposed_weights_and_parts(name: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D, which is quantised as a Linear; and every part of a tensor, however it is cut."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4)
    base = filled(transformers.GPT2LMHeadModel(config))
    folder = quantised(base, tmp_path, **CASES[name])
    adapted(
        base, IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True), tmp_path / "a", folder
    )
    merged_into(tmp_path / "a", folder, tmp_path / "out", dequantize=True)
    whole = transformers.GPT2LMHeadModel.from_pretrained(folder, device_map="cpu").dequantize()
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")
    scale = next(iter(rows.values())).flatten()
    wanted = whole.transformer.h[0].attn.c_attn.weight.detach()
    wanted = (wanted if wanted.shape[0] == 192 else wanted.T) * scale[:, None]
    torch.testing.assert_close(found.transformer.h[0].attn.c_attn.weight.detach().T, wanted, rtol=1e-5, atol=1e-6)
    view = dequantised(open_checkpoint(folder))
    key = "transformer.h.0.mlp.c_proj.weight"
    for start, stop in ((0, 7), (63, 129), (64, 128), (16000, 16384)):
        part = view.home[key].read_part(key, start, stop)
        assert torch.equal(part, view.read(key).flatten()[start:stop])


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["q_proj.qweight", "q_proj.qzeros"], torch.int32),
        (["q_proj.W_q"], torch.uint8),
        (["experts_blocks", "experts_scales"], torch.uint8),
        (["q_proj.weight._data"], torch.int8),
        (["q_proj.weight"], torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("is_experts_base", [True, False])
def test_packed_weights_are_known_by_their_names(
    names: list[str], dtype: torch.dtype, is_experts_base: bool, tmp_path: Path
) -> None:
    """Also of a checkpoint that the experts do not name: that it is quantised is what has to be known first."""
    base = llama(tmp_path / "base", **SIZES)
    adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "a", tmp_path / "base")
    packed = tmp_path / "base" if is_experts_base else tmp_path / "packed"
    if not is_experts_base:
        shutil.copytree(tmp_path / "base", packed)
    stored = load_file(packed / "model.safetensors")
    del stored["model.layers.0.self_attn.q_proj.weight"]
    stored |= {f"model.layers.0.self_attn.{name}": torch.zeros(4, 4).to(dtype) for name in names}
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PimergeError, match=r"is quantised: .*\n.*the unquantised original"):
        merged_into(tmp_path / "a", packed, tmp_path / "out")


def test_the_config_of_a_part_says_that_it_is_quantised(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **SIZES)
    adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "a", tmp_path / "base")
    set_checkpoint_config(tmp_path / "base", text_config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(PimergeError, match=r"is quantised: text_config\.quantization_config in config\.json"):
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize(
    ("stated", "named"),
    [({"quant_method": "gptq", "bits": 4}, ""), ({"quant_method": "awq"}, "org/model"), ({"quant_method": "fp8"}, "")],
)
def test_other_methods_name_the_original(stated: dict[str, Any], named: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", **SIZES)
    adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "a", tmp_path / "base")
    set_checkpoint_config(tmp_path / "base", quantization_config=stated)
    if named:
        (tmp_path / "base" / "README.md").write_text(f"---\nbase_model:\n- {named}\n---\n# Model\n")
    with pytest.raises(
        PimergeError, match=rf"is quantised: quantization_config.*\n.*original in F32.*{named}"
    ) as error:
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    assert "--dequantize" not in str(error.value)
    with pytest.raises(PimergeError, match="was not quantised by bitsandbytes"):
        merged_into(tmp_path / "a", tmp_path / "base", tmp_path / "out", dequantize=True)
