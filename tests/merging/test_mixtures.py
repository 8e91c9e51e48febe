"""Merges of adapters of mixtures of experts, against PEFT's own ΔW of every matrix of a stacked parameter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.reporting.inspection import inspect
from tests.support import merge_references as references
from tests.support.experts import set_config, set_tensors
from tests.support.mixtures import EXPERTS, MIXTURES, experts_name, mixture, save_adapter, updates_by_peft

Deltas = dict[str, Tensor]
Matrix = Callable[[list[Tensor]], Any]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, list[Deltas]]]:
    """A mixture, the folder of two adapters of its attention and its experts, and their ΔW."""
    made: dict[str, tuple[Any, Path, list[Deltas]]] = {}

    def pool_of(name: str) -> tuple[Any, Path, list[Deltas]]:
        if name not in made:
            base, folder = mixture(name), tmp_path_factory.mktemp(name)
            parameters = [f"{experts_name(name)}.{each}" for each in ("gate_up_proj", "down_proj")]
            attention = ["q_a_proj"] if name == "deepseek-v3" else ["q_proj"]
            for seed, letter in enumerate("ab", 1):
                config = {"target_modules": attention, "target_parameters": parameters, "r": seed + 1}
                patterns = {"rank_pattern": {"gate_up_proj": 1}, "alpha_pattern": {"down_proj": 5}}
                save_adapter(base, folder / letter, seed, **config, **(patterns if letter == "b" else {}))
            made[name] = base, folder, [updates_by_peft(base, folder / letter) for letter in "ab"]
        return made[name]

    return pool_of


def by_matrix(deltas: list[Deltas], combine: Matrix) -> Deltas:
    """Combine ΔW matrix by matrix."""
    found = {}
    for name in deltas[0]:
        both = [delta[name] for delta in deltas]
        if both[0].dim() == 3:
            found[name] = torch.stack([torch.as_tensor(combine(list(each))) for each in zip(*both, strict=True)])
        else:
            found[name] = torch.as_tensor(combine(both))
    return found


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == {name for name, delta in expected.items() if delta.abs().max() > 0}
    for name, delta in found.items():
        assert (delta - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def best_of_rank_1(deltas: list[Tensor]) -> Tensor:
    U, S, V = torch.linalg.svd(0.7 * deltas[0] + 0.4 * deltas[1], full_matrices=False)
    return S[0] * torch.outer(U[:, 0], V[0])


def without_rounding(delta: Tensor) -> Tensor:
    """A ΔW of low rank without the directions that come from rounding, which some methods would count."""
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return (U * torch.where(1e-5 * S[0] < S, S, 0.0)) @ V


@pytest.mark.parametrize("name", MIXTURES)
def test_peft_loads_the_weighted_sum_of_every_matrix(name: str, pool: Any, tmp_path: Path) -> None:
    base, folder, deltas = pool(name)
    pimerge.merge(
        [folder / "a", folder / "b"], weights=[0.7, 0.4], method="interpolated", output=tmp_path / "out", verify=True
    )
    require_equal(updates_by_peft(base, tmp_path / "out"), by_matrix(deltas, lambda d: 0.7 * d[0] + 0.4 * d[1]))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("method", ["uniform", "ties", "tsv"])
def test_methods_work_on_every_matrix(name: str, method: str, pool: Any, tmp_path: Path) -> None:
    base, folder, deltas = pool(name)
    options: dict[str, Any] = {"density": 0.5, "space": "delta"} if method == "ties" else {}
    pimerge.merge([folder / "a", folder / "b"], method=method, output=tmp_path / "out", **options)
    weights = [1.0, 1.0] if method in ("ties", "tsv") else [0.5, 0.5]
    options.pop("space", None)

    def combine(both: list[Tensor]) -> Any:
        return references.REFERENCES[method](torch.stack([without_rounding(each) for each in both]), weights, **options)

    require_equal(updates_by_peft(base, tmp_path / "out"), by_matrix(deltas, combine))


def test_the_rank_of_a_stacked_parameter_is_the_highest_of_its_matrices(pool: Any, tmp_path: Path) -> None:
    base, folder, deltas = pool("mixtral")
    options: dict[str, Any] = {"weights": [0.7, 0.4], "method": "interpolated"}
    both = [folder / "a", folder / "b"]
    pimerge.merge(both, rank=1, output=tmp_path / "one", **options)
    require_equal(updates_by_peft(base, tmp_path / "one"), by_matrix(deltas, best_of_rank_1))
    results = pimerge.merge(both, rank="auto", energy=0.9, output=tmp_path / "auto", **options)
    found, summed = updates_by_peft(base, tmp_path / "auto"), by_matrix(deltas, lambda d: 0.7 * d[0] + 0.4 * d[1])
    for name, delta in summed.items():
        for own, full in zip(found[name].view(-1, *delta.shape[-2:]), delta.view(-1, *delta.shape[-2:]), strict=True):
            assert 0 < (own - full).norm() ** 2 <= 0.1 * full.norm() ** 2
    assert results.path is not None


def test_a_matrix_that_is_left_out_is_zero(pool: Any, tmp_path: Path) -> None:
    base, folder, deltas = pool("mixtral")
    both = [folder / "a", folder / "b"]
    pimerge.merge(both, exclude=["*.experts.1.*"], output=tmp_path / "out")
    expected = by_matrix(deltas, lambda d: (d[0] + d[1]) / 2)
    for delta in expected.values():
        if delta.dim() == 3:
            delta[1] = 0
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)
    pimerge.merge(both, exclude=["*.gate_up_proj"], output=tmp_path / "down")
    without = {
        name: delta for name, delta in by_matrix(deltas, lambda d: (d[0] + d[1]) / 2).items() if "up" not in name
    }
    require_equal(updates_by_peft(base, tmp_path / "down"), without)


def test_adapters_of_different_parameters_of_one_module(tmp_path: Path) -> None:
    base = mixture("mixtral")
    save_adapter(base, tmp_path / "up", 1, target_modules=[], target_parameters=["experts.gate_up_proj"])
    save_adapter(base, tmp_path / "down", 2, target_modules=[], target_parameters=["experts.down_proj"])
    save_adapter(base, tmp_path / "all", 3, target_modules="all-linear")
    deltas = [updates_by_peft(base, tmp_path / name) for name in ("up", "down", "all")]
    experts = [tmp_path / name for name in ("up", "down", "all")]
    pimerge.merge(experts, method="interpolated", weights=[1, 2, 3], output=tmp_path / "out")
    found = updates_by_peft(base, tmp_path / "out")
    expected = {name: 3 * delta for name, delta in deltas[2].items()}
    for factor, delta in zip((1, 2), deltas, strict=False):
        for name in delta:
            expected[name] = expected[name] + factor * delta[name]
    require_equal(found, expected)


class _Net(nn.Module):
    """Bare parameters that are no mixture: a matrix, a stack, and the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.matrix = nn.Parameter(torch.ones(4, 5))
        self.stacked = nn.Module()
        self.stacked.weight = nn.Parameter(torch.ones(2, 6, 3))
        self.layer = nn.Linear(3, 7)


def test_parameters_that_are_no_mixture(tmp_path: Path) -> None:
    base = _Net()
    parameters = ["inner.matrix", "stacked.weight", "layer.weight"]
    for seed, letter in enumerate("ab"):
        save_adapter(base, tmp_path / letter, seed, target_modules=[], target_parameters=parameters)
    deltas = [updates_by_peft(base, tmp_path / letter) for letter in "ab"]
    pimerge.merge([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    require_equal(updates_by_peft(base, tmp_path / "out"), by_matrix(deltas, lambda d: (d[0] + d[1]) / 2))


def by_expert(folder: Path, copy: Path) -> Path:
    """A copy of an adapter with the columns of one matrix side by side in B, as older Unsloth stores it."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    moved = {
        key: B.view(len(B), -1, EXPERTS).transpose(1, 2).reshape(B.shape)
        for key, B in tensors.items()
        if "experts" in key and "lora_B" in key
    }
    return set_tensors(copy, moved)


def test_the_order_of_unsloth_is_read_and_peft_s_is_written(pool: Any, tmp_path: Path) -> None:
    base, folder, deltas = pool("mixtral")
    copy = by_expert(folder / "a", tmp_path / "a")
    set_config(copy, auto_mapping={"unsloth_fixed": True})
    with pytest.raises(PimergeError, match=r"(?s)trained with Unsloth.*--expert-order expert or --expert-order rank"):
        pimerge.merge([copy], output=tmp_path / "out")
    told = pimerge.merge([copy], output=tmp_path / "told", expert_order="expert")
    require_equal(updates_by_peft(base, tmp_path / "told"), deltas[0])
    assert told.plan["handled"][-1] == "Unsloth's order of a mixture's experts in 'a': PEFT's in the result"
    with pytest.raises(PimergeError, match="--expert-order must be one of rank, expert; got 'both'"):
        pimerge.merge([copy], output=tmp_path / "out", expert_order="both")
    with pytest.raises(PimergeError, match="for experts that are named, not for a ranking"):
        pimerge.merge(expert_order="rank", output=tmp_path / "out")
    (finding,) = inspect([copy], expert_order="rank")
    assert finding.expert is not None
    assert not any("Unsloth" in problem.message for problem in finding.problems)
    with pytest.raises(PimergeError, match=r"(?s)lora_B_layout in adapter_config.json is 'x'.*expected rank_major"):
        pimerge.merge([set_config(copy, lora_B_layout="x")], output=tmp_path / "out")
    set_config(copy, lora_B_layout="grouped_by_expert")
    pimerge.merge([copy, folder / "b"], output=tmp_path / "out")
    require_equal(updates_by_peft(base, tmp_path / "out"), by_matrix(deltas, lambda d: (d[0] + d[1]) / 2))


@pytest.mark.parametrize("order", ["rank", "expert"])
def test_zeros_of_an_expert_that_no_token_reached_show_the_order(order: str, tmp_path: Path) -> None:
    base = mixture("mixtral")
    parameters = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    save_adapter(base, tmp_path / "a", 1, **parameters)
    B = load_file(tmp_path / "a" / "adapter_model.safetensors")[key]
    B[:, 1::EXPERTS] = 0
    set_tensors(tmp_path / "a", {key: B})
    expected = updates_by_peft(base, tmp_path / "a")
    copy = by_expert(tmp_path / "a", tmp_path / "b") if order == "expert" else tmp_path / "a"
    set_config(copy, base_model_name_or_path="unsloth/Mixture")
    pimerge.merge([copy], output=tmp_path / "out")
    require_equal(updates_by_peft(base, tmp_path / "out"), expected)


def test_updates_for_measures_are_the_factors(pool: Any, tmp_path: Path) -> None:
    """Also in bfloat16, which numpy does not have."""
    _, folder, deltas = pool("qwen3-moe")
    tensors = load_file(folder / "a" / "adapter_model.safetensors")
    shutil.copytree(folder / "a", tmp_path / "a")
    expert = open_expert(set_tensors(tmp_path / "a", {key: tensor.bfloat16() for key, tensor in tensors.items()}))
    name = "model.layers.0.mlp.experts.1.down_proj"
    A, scaled = expert.updates([name])[name]
    delta = deltas[0]["model.layers.0.mlp.experts.down_proj"][1]
    torch.testing.assert_close(torch.tensor(scaled.T @ A), delta, rtol=0.02, atol=0.01)


def test_stacks_that_differ_are_refused(tmp_path: Path) -> None:
    base = mixture("mixtral")
    parameters = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    for letter in "ab":
        save_adapter(base, tmp_path / letter, 1, **parameters)
    set_config(tmp_path / "b", r=1)
    with pytest.raises(PimergeError, match=r"one of 6 matrices\) in 'b'.*one of 3 matrices\) in 'a'"):
        pimerge.merge([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    set_config(tmp_path / "b", r=4)
    with pytest.raises(PimergeError, match=r"A has 6 rows, which is not a multiple of the rank 4"):
        pimerge.merge([tmp_path / "b"], output=tmp_path / "out")
    set_config(tmp_path / "b", r=2, target_parameters=["x", "down_proj"])
    with pytest.raises(PimergeError, match=r"nests its parameters down_proj, x in the order of the base's code"):
        pimerge.merge([tmp_path / "b"], output=tmp_path / "out")
    set_config(tmp_path / "b", target_parameters=["down_proj"])
    with pytest.raises(PimergeError, match=r"has 2 updates of parameters, but target_parameters means down_proj\n"):
        pimerge.merge([tmp_path / "b"], output=tmp_path / "out")
