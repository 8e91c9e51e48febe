"""Adapters of mixtures under the names of earlier models, against dense updates and PEFT's own conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pimerge
from pimerge.adapters import fused_experts
from pimerge.adapters.compatibility import require_alike
from pimerge.adapters.expert import open_expert
from pimerge.adapters.fused_experts import fused
from pimerge.adapters.lora_module import BareParameter, LoraModule
from pimerge.core.errors import PimergeError
from tests.support.experts import set_config, set_tensors
from tests.support.mixtures import mixture, save_adapter, save_adapter_by_layer, updates_by_peft

FORM = (2, 2.0, 1.0, "linear", (2, 8), (12, 2))
BY_LAYER = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "olmoe")


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert (delta - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("is_here", [True, False], ids=["base here", "base elsewhere"])
@pytest.mark.parametrize("name", BY_LAYER)
def test_adapters_of_both_eras_merge(name: str, is_here: bool, tmp_path: Path) -> None:
    """PEFT loads the weighted sum, shared experts included, which it would not load under the earlier names."""
    base = mixture(name)
    old = save_adapter_by_layer(base, name, tmp_path / "old", 1)
    save_adapter(base, tmp_path / "new", 2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"], r=3)
    if is_here:
        base.save_pretrained(tmp_path / "base")
        for letter in ("old", "new"):
            set_config(tmp_path / letter, base_model_name_or_path="../base")
    new = updates_by_peft(base, tmp_path / "new")
    pimerge.merge(
        [tmp_path / "old", tmp_path / "new"], method="interpolated", weights=[0.7, 0.4], output=tmp_path / "out"
    )
    expected = {key: 0.7 * delta + (0.4 * new[key] if key in new else 0) for key, delta in old.items()}
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)


def test_an_adapter_alone_is_what_peft_converts_it_to(tmp_path: Path) -> None:
    base = mixture("mixtral")
    expected = save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1)
    require_equal(updates_by_peft(base, tmp_path / "old"), expected)
    pimerge.merge([tmp_path / "old"], output=tmp_path / "out", exclude=["*.experts.1.*"], rank="auto", energy=1.0)
    for delta in expected.values():
        if delta.dim() == 3:
            delta[1] = 0
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)


def test_half_of_a_fused_matrix(tmp_path: Path) -> None:
    """PEFT refuses to load it, but it has one meaning: the other half of the rows has no update."""
    base = mixture("mixtral")
    expected = save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1, layers=["up", "down"])
    pimerge.merge([tmp_path / "old"], output=tmp_path / "out")
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)


def test_halves_of_different_scalings_and_dtypes(tmp_path: Path) -> None:
    base = mixture("mixtral")
    patterns = {"alpha_pattern": {"w3": 5}}
    expected = save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1, **patterns)
    expected["model.layers.0.mlp.experts.gate_up_proj"][:, 12:] *= 5 / 3
    pimerge.merge([tmp_path / "old"], output=tmp_path / "out")
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)
    module = open_expert(tmp_path / "old").with_strength(0.5)
    factors = module.factors("model.layers.0.mlp.experts.0.gate_up_proj")
    half = 0.5 * expected["model.layers.0.mlp.experts.gate_up_proj"][0]
    torch.testing.assert_close((factors.scaling * factors.B @ factors.A).double(), half, rtol=1e-4, atol=1e-5)


def test_halves_of_different_shapes_are_refused(tmp_path: Path) -> None:
    save_adapter_by_layer(mixture("mixtral"), "mixtral", tmp_path / "old", 1)
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w3.lora_B.weight"
    set_tensors(tmp_path / "old", {key: torch.ones(5, 2)})
    with pytest.raises(PimergeError, match=r"experts.0.w1' and '.*w3' have updates of different shapes"):
        open_expert(tmp_path / "old")


def test_a_model_that_transformers_does_not_know_keeps_its_names(tmp_path: Path) -> None:
    save_adapter_by_layer(mixture("mixtral"), "mixtral", tmp_path / "old", 1)
    mixture("mixtral").save_pretrained(tmp_path / "base")
    set_config(tmp_path / "old", base_model_name_or_path="../base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("MixtralForCausalLM", "OwnForCausalLM"))
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in open_expert(tmp_path / "old").modules


def test_a_mixture_by_layer_and_stacked_is_refused(tmp_path: Path) -> None:
    """DoRA's updates are converted with the weights of the layers, which keep their names."""
    base = mixture("mixtral")
    save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1)
    save_adapter(base, tmp_path / "new", 2, target_modules=[], target_parameters=["down_proj"])
    experts = [open_expert(tmp_path / "old"), open_expert(tmp_path / "new")]
    unconverted = LoraModule("model.layers.0.block_sparse_moe.experts.0.w1", "", "", None, *FORM)
    mixed = [replace(experts[0], modules={unconverted.name: unconverted}), experts[1]]
    with pytest.raises(PimergeError, match=r"experts.0.w1' is the layer of a mixture's expert in one adapter"):
        require_alike(mixed)


def test_experts_without_a_gate_keep_their_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models, such as Nemotron-H, stack up_proj as it is."""
    ends = ("mixer.experts.up_proj", "mixer.experts.down_proj")
    monkeypatch.setattr(fused_experts, "_rename_of", lambda base: lambda name: name if name.endswith(ends) else None)
    names = [f"model.mixer.experts.{index}.{layer}" for index in (0, 1) for layer in ("up_proj", "down_proj")]
    nothing: Any = None
    found = fused({name: LoraModule(name, "A", "B", None, *FORM) for name in names}, lambda: nothing)
    assert sorted(found) == sorted(names)
    assert [module.parameter for module in found.values()] == [
        BareParameter("model.mixer.experts", layer, 2, index) for index in (0, 1) for layer in ("down_proj", "up_proj")
    ]
    assert all((module.d_out, module.d_in) == (12, 8) for module in found.values())
