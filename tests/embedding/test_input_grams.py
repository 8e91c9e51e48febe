"""Gram matrices of layers' inputs against a loop in float64, one unpadded example at a time, with its own hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pimerge.embedding.input_grams import input_grams, linear_layers
from pimerge.tasks.examples import Examples
from tests.support.bases import layers
from tests.support.experts import PeftCase
from tests.support.numerics import relative_difference

COUNT = 9
# what the model hands to its layers differs by rounding between one example alone and the same in a batch
ROUNDING = 1e-5
TARGETS = {
    "vit": ["q_proj", "fc1", "fc2"],
    "bert": ["query", "attention.output.dense", "pooler.dense"],
    "gpt2": ["c_attn", "c_proj"],
}
Batch = dict[str, Tensor]


def by_loop(model: nn.Module, names: Sequence[str], singles: Sequence[Batch]) -> dict[str, Tensor]:
    """Σ x xᵀ / number of x, from the inputs of lora_A, example by example."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default"):
            plain = name.removeprefix("base_model.model.").removesuffix(".lora_A.default")

            def keep(module: nn.Module, args: Any, output: Tensor, plain: str = plain) -> None:
                inputs[plain].extend(args[0].detach().double().reshape(-1, args[0].shape[-1]))

            handles.append(module.register_forward_hook(keep))
    for single in singles:
        assert all(len(value) == 1 for value in single.values())
        model(**{name: value for name, value in single.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    return {name: sum(torch.outer(x, x) for x in found) / len(found) for name, found in inputs.items()}


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> object:
    return model(**{name: value for name, value in batch.items() if name != "labels"})


@dataclass
class Case:
    """A PEFT model, some examples, and the Gram matrices of its adapted layers by the loop."""

    model: nn.Module
    layers: dict[str, nn.Module]
    examples: Examples
    reference: dict[str, Tensor]

    def grams(self, batches: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return input_grams(self.layers, batches, self.examples.batch, partial(forward, self.model))


MakeCase = Callable[..., Case]


@pytest.fixture(scope="module")
def make_case(peft_case: PeftCase) -> MakeCase:
    """``make_case(kind, dtype)``: a case on a tiny model."""

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Case:
        model, examples, singles = peft_case(kind, COUNT, dtype, target_modules=TARGETS[kind])
        plain = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A")
            for name, _ in model.named_modules()
            if name.endswith(".lora_A")
        }
        return Case(model, linear_layers(model, plain), examples, by_loop(model, sorted(plain), singles))

    return make


@pytest.fixture(scope="module")
def cases(make_case: MakeCase) -> dict[str, Case]:
    return {kind: make_case(kind) for kind in TARGETS}


def assert_is_the_loops(found: Mapping[str, Tensor], case: Case, tolerance: float = ROUNDING) -> None:
    assert list(found) == sorted(case.reference)
    for name, value in case.reference.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], found[name].T)
        assert relative_difference(found[name], value) < tolerance, name


@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(COUNT)), size=st.integers(1, COUNT))
def test_grams_are_the_loops_for_any_order_batch_size_and_padding(
    cases: dict[str, Case], kind: str, order: list[int], size: int
) -> None:
    found = cases[kind].grams([order[start : start + size] for start in range(0, COUNT, size)])
    assert_is_the_loops(found, cases[kind])


@pytest.mark.parametrize("kind", TARGETS)
def test_a_float64_model_is_exact_up_to_the_stored_float32(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind, torch.float64)
    assert_is_the_loops(case.grams([[4, 0, 7, 1], [2, 3, 5, 6, 8]]), case, 1e-7)


def test_the_cases_have_what_they_are_to_test(cases: dict[str, Case]) -> None:
    assert len(set(cases["bert"].examples.lengths)) > 4  # so that batches are padded
    assert {type(layer).__name__ for layer in cases["gpt2"].layers.values()} == {"Conv1D"}
    assert cases["gpt2"].reference["transformer.h.0.mlp.c_proj"].shape == (64, 64)  # d_in, not d_out
    padded = cases["bert"].examples.batch(range(COUNT))
    singles = [{name: value[i : i + 1] for name, value in padded.items()} for i in range(COUNT)]
    spoilt = by_loop(cases["bert"].model, sorted(cases["bert"].reference), singles)
    name = "bert.encoder.layer.0.attention.self.query"
    assert relative_difference(spoilt[name], cases["bert"].reference[name]) > 0.01  # padding would show


def test_sixteen_bit_inputs_are_summed_wide(make_case: MakeCase) -> None:
    case = make_case("vit", torch.bfloat16)  # the loop sums the same bfloat16 inputs in float64
    assert_is_the_loops(case.grams([[index] for index in range(COUNT)]), case)


def test_the_same_bits_twice_and_a_model_that_is_left_as_it_was(cases: dict[str, Case]) -> None:
    case = cases["bert"]
    before = [len(layer._forward_pre_hooks) for layer in case.layers.values()]
    first, second = (case.grams([[0, 1, 2, 3], [4, 5, 6, 7, 8]]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [len(layer._forward_pre_hooks) for layer in case.layers.values()] == before == [0] * len(before)


def test_hooks_are_gone_after_an_error(cases: dict[str, Case]) -> None:
    case = cases["vit"]

    def fail(batch: Batch) -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        input_grams(case.layers, [[0]], case.examples.batch, fail)
    assert not any(layer._forward_pre_hooks for layer in case.layers.values())


def test_embeddings_and_convolutions_have_no_gram_matrix() -> None:
    model = get_peft_model(layers(), LoraConfig(r=2, target_modules=["words", "proj", "conv"]))
    found = linear_layers(model, ["words", "proj", "inner.proj", "conv"])
    assert list(found) == ["proj", "inner.proj"]
    assert all(type(layer) is nn.Linear for layer in found.values())


@pytest.mark.parametrize("flat", [True, False])
def test_padding_is_left_out_however_the_model_lays_out_its_tokens(flat: bool) -> None:
    layer = nn.Linear(3, 3)
    x = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    rows = torch.stack([x[0, 0], x[0, 1], x[0, 2], x[1, 2], x[1, 3]])
    entering = x.reshape(8, 3) if flat else x[:, :, None]  # (batch · tokens, d_in) or (batch, tokens, 1, d_in)
    batch = {"attention_mask": mask}
    found = input_grams({"a": layer}, [[0, 1]], lambda ids: batch, lambda batch: layer(entering))
    torch.testing.assert_close(found["a"], rows.T @ rows / 5)


def test_a_layer_that_is_used_twice_counts_twice_and_one_that_is_not_used_is_absent() -> None:
    used, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.arange(6.0).reshape(2, 3)

    def run(batch: Batch) -> object:
        return used(batch["x"]) + used(2 * batch["x"])

    found = input_grams({"unused": unused, "used": used}, [[0], [1]], lambda ids: {"x": x[ids]}, run)
    assert list(found) == ["used"]
    torch.testing.assert_close(found["used"], (1 + 4) * x.T @ x / 4)
