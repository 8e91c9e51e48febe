"""ΔW of every kind that PEFT computes, against what PEFT merges into another base than the one it was saved with."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pimerge.adapters.computed_module import ComputedModule, factorised
from pimerge.adapters.kind import KINDS, AdapterHeader
from pimerge.core.errors import PimergeError

LINEAR: dict[str, list[dict[str, Any]]] = {
    "loha": [{"r": 2, "alpha": 3}, {"r": 6}],
    "lokr": [{"r": 2, "alpha": 3}, {"r": 1, "decompose_both": True}, {"r": 64}],
    "vera": [{"r": 4}, {"r": 3, "save_projection": False, "projection_prng_key": 7}],
    "pvera": [{"r": 4}, {"r": 3, "save_projection": False, "projection_prng_key": 7}],
    "randlora": [{"r": 5}, {"r": 3, "save_projection": False, "sparse": True}],
    "fourierft": [{"n_frequency": 6}, {"n_frequency": 40, "scaling": 20.0, "random_loc_seed": 5}],
    "waveft": [{"n_frequency": 8}, {"n_frequency": 30, "random_loc_seed": 5, "use_idwt": False}],
    "gralora": [{"r": 8, "gralora_k": 2}, {"r": 8, "gralora_k": 4, "hybrid_r": 4}],
    "vblora": [{"r": 2, "num_vectors": 6, "vector_length": 4}],
    "c3a": [{"block_size": 4}, {"block_size": 8}],
    "adalora": [
        {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6},
        {"init_r": 3, "target_r": 1, "total_step": 10, "rank_pattern": {"q.lora_E.default": [True, False, True]}},
    ],
    "delora": [{"r": 3}, {"r": 9, "delora_lambda": 4}],
    "miss": [{"r": 4}, {"r": 4, "init_weights": "mini", "mini_r": 2}, {"r": 4, "init_weights": "bat"}],
    "shira": [{"r": 2}],
    "hira": [{"r": 2}, {"r": 5}],
    "unilora": [{"r": 2, "theta_d_length": 40, "save_indices": True}],
    "oft": [
        {"oft_block_size": 4},
        {"oft_block_size": 8, "block_share": True},
        {"oft_block_size": 4, "use_cayley_neumann": False},
    ],
    "boft": [{"boft_block_size": 4}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}],
    "hra": [{"r": 2}, {"r": 4, "apply_GS": True}],
    "psoft": [{"r": 3, "psoft_alpha": 6}],
    "deft": [{"r": 3}, {"r": 3, "decomposition_method": "qr"}, {"r": 2, "para": True}],
    "osf": [{}, {"effective_rank": 3}],
    "peanut": [{"r": 3}, {"r": 3, "depth": 1}],
    "supertuning": [
        {"sparsity": 0.8},
        {"sparsity": 0.8, "save_precomputed_indices": True},
        {"sparsity": 0.8, "r": 2, "lora_alpha": 3, "select_top": False},
    ],
}
"""Kind → fields of PEFT's config."""
IN_CONV1D = (
    "vera",
    "pvera",
    "randlora",
    "fourierft",
    "waveft",
    "gralora",
    "vblora",
    "adalora",
    "hira",
    "unilora",
    "deft",
)
IN_CONVOLUTIONS = ("loha", "lokr", "adalora", "hira", "oft", "boft", "hra")
SQUARE = ("oft", "boft", "hra")
"""For which PEFT takes kernels to be square."""
TOLERANCE = dict.fromkeys(LINEAR, 2e-6) | {"psoft": 1e-4}  # which PEFT computes in single precision only


def base(layers: dict[str, tuple[int, ...]], seed: int, gpt2: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    for name, (d_out, d_in, *kernel) in layers.items():
        made: nn.Module = Conv1D(d_out, d_in) if gpt2 else nn.Linear(d_in, d_out)
        if kernel:
            made = nn.Conv2d(d_in, d_out, (kernel[0], kernel[1]))
        model.add_module(name, made)
    return model.double()


def by_rows(layer: nn.Module) -> Tensor:
    """A layer's weight, (d_out × d_in)."""
    weight = layer.weight.detach().clone().flatten(1)  # type: ignore[operator, union-attr]
    return weight.T if isinstance(layer, Conv1D) else weight


def largest_error(kind: str, fields: dict[str, Any], layers: dict[str, tuple[int, ...]], gpt2: bool = False) -> float:
    """The largest relative error of ΔW over some layers."""
    strategy = KINDS.load(kind)
    targets = list(layers)
    kept = fields.get("rank_pattern")  # of AdaLoRA, known at the end of the training
    fields = {name: value for name, value in fields.items() if name != "rank_pattern"}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[strategy.peft_type](target_modules=targets, **fields)
    if gpt2:
        config.fan_in_fan_out = True
    trained = get_peft_model(base(layers, 0, gpt2).float(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if kept:
        config.rank_pattern = kept
    with TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
        header = AdapterHeader(
            json.loads(Path(folder, "adapter_config.json").read_text()),
            {key: tuple(tensor.shape) for key, tensor in tensors.items()},
            convert=True,
            layers=lambda names: {name: layers[name] for name in names},
        )
        other = base(layers, 5, gpt2)
        other = other.float() if kind == "psoft" else other
        before = {name: by_rows(other.get_submodule(name)) for name in targets}
        merged = PeftModel.from_pretrained(other, folder, autocast_adapter_dtype=False).merge_and_unload()
    modules, _ = strategy.parse(header)
    assert list(modules) == sorted(targets)
    errors = []
    for name, module in modules.items():
        assert isinstance(module, ComputedModule)
        factors = module.factors(lambda key: tensors[key], before[name] if module.conversions else None)
        assert (len(factors.A), factors.A.shape[1], len(factors.B)) == (module.rank, module.d_in, module.d_out)
        expected = by_rows(merged.get_submodule(name)) - before[name]
        found = factors.scaling * factors.B @ factors.A
        errors.append(float((found - expected).norm() / expected.norm()))
    return max(errors)


def test_every_kind_whose_update_is_computed_is_tried() -> None:
    assert set(LINEAR) == {kind.name for kind in KINDS if kind.has_update and not kind.stores_factors}


@pytest.mark.parametrize(("kind", "fields"), [(kind, each) for kind, all_of in LINEAR.items() for each in all_of])
def test_the_update_is_what_peft_merges_into_another_base(kind: str, fields: dict[str, Any]) -> None:
    layers = {"q": (16, 16), "up": (24, 16), "down": (16, 24)}
    assert largest_error(kind, fields, layers) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", IN_CONV1D)
def test_layers_that_store_their_weight_transposed(kind: str) -> None:
    assert largest_error(kind, LINEAR[kind][0], {"q": (16, 16), "up": (24, 16)}, gpt2=True) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", IN_CONVOLUTIONS)
def test_convolutions(kind: str) -> None:
    assert (
        largest_error(kind, LINEAR[kind][0], {"flat": (12, 8, 3, 2 + (kind in SQUARE)), "point": (12, 8, 1, 1)})
        < TOLERANCE[kind]
    )


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(LINEAR)), rows=st.integers(1, 4), columns=st.integers(1, 4), data=st.data())
def test_layers_of_any_shape(kind: str, rows: int, columns: int, data: st.DataObject) -> None:
    fields = data.draw(st.sampled_from(LINEAR[kind]))
    if "rank_pattern" not in fields:
        assert largest_error(kind, fields, {"a": (8 * rows, 8 * columns), "b": (8 * columns, 8)}) < TOLERANCE[kind]


@given(
    rank=st.integers(1, 6),
    excess=st.integers(0, 9),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_factors_of_a_bounded_rank_are_exact(rank: int, excess: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    delta = B @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    bound = min(rank + excess, rows, columns)
    A, B = factorised(delta, bound)
    assert (len(A), B.shape[1]) == (bound, bound)
    torch.testing.assert_close(B @ A, delta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["hira", "miss"])
def test_an_update_made_of_the_base_is_refused_without_it(kind: str) -> None:
    shapes = {"hira": {"hira_A": (2, 8), "hira_B": (8, 2)}, "miss": {"miss_block": (8, 8, 1)}}[kind]
    config = {"r": 2} | ({"init_weights": "bat"} if kind == "miss" else {})
    header = AdapterHeader(
        config,
        {f"base_model.model.q.{slot}": shape for slot, shape in shapes.items()},
        layers=lambda names: {"q": (8, 8)},
    )
    with pytest.raises(PimergeError, match=r"depends on the base's weights[\s\S]*--base BASE"):
        KINDS.load(kind).parse(header)
