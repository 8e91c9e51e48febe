"""Adapters in other file formats give PEFT the updates that their tools compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pimerge
from pimerge.adapters.as_peft import in_base
from pimerge.core.errors import PimergeError
from tests.support.adapter_files import written
from tests.support.bases import model_for
from tests.support.experts import MakeExpert
from tests.support.numerics import normal, relative_difference
from tests.support.peft_outputs import open_strictly

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture
def llama(language_base: Callable[[str], Path]) -> Path:
    return language_base("llama-lm")


def updates(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Module → what PEFT adds to its weight, for all that change."""
    before = model_for(base).state_dict()
    after = open_strictly(model_for(base), adapter).merge_and_unload().state_dict()
    deltas = {key: (after[key] - before[key]).double() for key in before if not torch.equal(after[key], before[key])}
    return {key.removesuffix(".weight"): delta for key, delta in deltas.items()}


def test_mlx(tmp_path: Path, llama: Path) -> None:
    A, B, scale = normal(16, 3), normal(3, 16, seed=1), 2.5
    (tmp_path / "x").mkdir()
    save_file({f"{Q}.lora_a": A, f"{Q}.lora_b": B}, tmp_path / "x" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "model": str(llama), "num_layers": 2, "lora_parameters": {"scale": scale}}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    converted = pimerge.convert(tmp_path / "x", output=tmp_path / "y")
    assert "mlx" in converted.summary
    assert relative_difference(updates(llama, tmp_path / "y")[Q], scale * (A @ B).T.double()) < 1e-5
    pimerge.convert(tmp_path / "x", rank=1, output=tmp_path / "z")
    assert torch.linalg.matrix_rank(updates(llama, tmp_path / "z")[Q], atol=1e-4) == 1


def test_flattened_names_are_resolved_by_the_base(tmp_path: Path, llama: Path) -> None:
    A, B = normal(3, 16), normal(16, 3, seed=1)
    a, b, c, d = normal(8, 2), normal(2, 16, seed=2), normal(8, 2, seed=3), normal(2, 16, seed=4)
    q, v = (f"lycoris_{name.replace('.', '_')}" for name in (Q, V))
    tensors = {f"{q}.lora_down.weight": A, f"{q}.lora_up.weight": B, f"{q}.alpha": torch.tensor(6.0)}
    for slot, tensor in {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}.items():
        tensors[f"{v}.hada_{slot}"] = tensor
    save_file(tensors | {f"{v}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(PimergeError, match=r"format of lycoris[\s\S]*pass --base with its folder"):
        pimerge.convert(tmp_path / "x.safetensors", output=tmp_path / "y")
    pimerge.convert(tmp_path / "x.safetensors", base=llama, output=tmp_path / "y")
    found = updates(llama, tmp_path / "y")
    assert found.keys() == {Q, V}
    assert relative_difference(found[Q], 2 * (B @ A).double()) < 1e-5
    assert relative_difference(found[V], (0.5 * (a @ b) * (c @ d)).double()) < 1e-5
    stated = json.loads((tmp_path / "y" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (tmp_path / "y" / stated).resolve() == llama or Path(stated) == llama


@pytest.mark.parametrize("builder", ["kohya", "diffusers", "old_diffusers", "ai-toolkit"])
def test_a_diffusion_adapter_keeps_its_format(tmp_path: Path, builder: str, llama: Path) -> None:
    source = written(tmp_path / "x.safetensors", builder, 1)
    with pytest.raises(PimergeError, match="an adapter of a diffusion model keeps its own format"):
        pimerge.convert(source, output=tmp_path / "y")
    with pytest.raises(PimergeError, match=r"the base has no module for"):
        pimerge.convert(source, base=llama, output=tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_name_that_is_ambiguous_is_refused() -> None:
    with pytest.raises(PimergeError, match=r"'lora_a_b_c' can be a\.b_c or a_b\.c of the base"):
        in_base(["lora_a_b_c"], ["a.b_c", "a_b.c"])


def test_other_keys_become_those_of_today(tmp_path: Path, bert_base: Path, make_expert: MakeExpert) -> None:
    source = make_expert(tmp_path / "a", bert_base)
    before = load_file(source / "adapter_model.safetensors")
    named = {
        key.replace(".weight", ".default.weight") if ".lora_" in key else key: each for key, each in before.items()
    }
    save_file(named, source / "adapter_model.safetensors")
    pimerge.convert(source, output=tmp_path / "b")
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[key], before[key]) for key in before)


def test_shards_and_files_elsewhere_become_a_folder_of_peft(
    tmp_path: Path, bert_base: Path, make_expert: MakeExpert
) -> None:
    source = make_expert(tmp_path / "a", bert_base)
    tensors = load_file(source / "adapter_model.safetensors")
    places = {key: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    (tmp_path / "b").mkdir()
    for shard in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == shard}, tmp_path / "b" / shard)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "b" / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "b" / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    converted = pimerge.convert(tmp_path / "b", output=tmp_path / "c")
    found = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    open_strictly(model_for(bert_base), tmp_path / "c")
    assert converted.to_dict()["tensors"] == len(tensors)
