"""Updates of bare parameters: their layout, whether they fit a base, and what refuses them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from pimerge.adapters.bare_parameter import packed
from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.compatibility import check_expert, refuse_only_merged
from pimerge.adapters.expert import open_expert
from pimerge.adapters.lora_module import Factors
from pimerge.core.errors import PimergeError
from pimerge.models.injection import injected, injected_sum
from tests.support.experts import set_config
from tests.support.mixtures import MIXTURES, experts_name, mixture, save_adapter, save_adapter_by_layer, updates_by_peft
from tests.support.numerics import normal


@given(st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any))
def test_packed_slices_are_what_peft_unpacks(ranks: list[int]) -> None:
    """Ranks differ, and rank 0 stands for a matrix that is left out."""
    slices = {
        index: Factors(normal(rank, 5, seed=index), normal(4, rank, seed=9 + index), 1.0 + index)
        for index, rank in enumerate(ranks)
        if rank
    }
    A, B = packed(slices, len(ranks))
    base = nn.Module()
    base.stacked = nn.Module()
    base.stacked.weight = nn.Parameter(torch.zeros(len(ranks), 4, 5))
    config = LoraConfig(r=max(ranks), lora_alpha=max(ranks), target_modules=[], target_parameters=["stacked.weight"])
    layer: Any = get_peft_model(base, config).base_model.model.stacked
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    delta = layer.get_delta_weight("default")
    for index, factors in slices.items():
        torch.testing.assert_close(delta[index], factors.scaling * factors.B @ factors.A)
    assert all(not delta[index].any() for index, rank in enumerate(ranks) if not rank)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_fits_the_base_that_it_was_trained_on(name: str, tmp_path: Path) -> None:
    base = mixture(name)
    names = [f"{experts_name(name)}.{each}" for each in ("gate_up_proj", "down_proj")]
    save_adapter(base, tmp_path / "a", 1, target_modules=[], target_parameters=names)
    expert = open_expert(tmp_path / "a")
    check_fits(expert, base)
    with pytest.raises(PimergeError, match="the base has no parameter"):
        check_fits(expert, nn.Linear(2, 2))
    model = mixture(name)
    model.get_submodule(f"model.layers.0.{experts_name(name)}").down_proj.data = torch.zeros(2, 5, 5)
    with pytest.raises(PimergeError, match=r"down_proj': ΔW is .*, but the base's weight is"):
        check_fits(expert, model)


def test_what_needs_layers_refuses_bare_parameters(tmp_path: Path) -> None:
    save_adapter(mixture("mixtral"), tmp_path / "a", 1, target_modules="all-linear")
    expert = open_expert(tmp_path / "a")
    for what in ("embedded", "tuned"):
        with pytest.raises(PimergeError, match=rf"(?s)adapts the parameter '.*' \(target_parameters\).*can be {what}"):
            refuse_only_merged([expert], what)
    with pytest.raises(PimergeError, match="only updates of layers can be embedded"):
        check_expert(expert)


def test_a_base_computes_with_them(tmp_path: Path) -> None:
    """What is evaluated and ranked by examples is W0 + Σ w_n ΔW_n, in whatever order B is stored."""
    base = mixture("mixtral")
    loaded: Any = SimpleNamespace(model=base)
    for seed, letter in enumerate("ab"):
        save_adapter(base, tmp_path / letter, seed, target_modules=[], target_parameters=["experts.down_proj"])
    experts = [open_expert(tmp_path / letter) for letter in "ab"]
    deltas = [updates_by_peft(base, tmp_path / letter) for letter in "ab"]
    ids, direct = torch.tensor([[3, 4, 5]]), mixture("mixtral")
    with torch.no_grad():
        for name, delta in deltas[0].items():
            direct.get_parameter(name).add_((0.7 * delta + 0.4 * deltas[1][name]).float())
        with injected_sum(experts, [0.7, 0.4], loaded) as model:
            torch.testing.assert_close(model(ids).logits, direct(ids).logits, rtol=1e-4, atol=1e-5)
    other = open_expert(set_config(tmp_path / "b", lora_B_layout="grouped_by_expert"))
    with (
        pytest.raises(
            PimergeError, match=r"(?s)Unsloth's order, which PEFT does not read in every model.*pimerge merge"
        ),
        injected(other, loaded),
    ):
        pass
    save_adapter_by_layer(base, "mixtral", tmp_path / "old", 1)
    with (
        pytest.raises(PimergeError, match=r"(?s)under the names of an earlier version.*pimerge merge"),
        injected(open_expert(tmp_path / "old"), loaded),
    ):
        pass
    save_adapter(base, tmp_path / "c", 3, target_modules=[], target_parameters=["experts.gate_up_proj"])
    with (
        pytest.raises(PimergeError, match="the experts adapt different parameters"),
        injected_sum([experts[0], open_expert(tmp_path / "c")], [1, 1], loaded),
    ):
        pass
