"""The diagonal Fisher against a batch-of-one loop by ``torch.autograd.grad``, written here once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pimerge.core.progress import Advance
from pimerge.embedding.fisher import Fisher, diagonal_fisher
from pimerge.tasks.examples import Examples, bucket_by_length
from tests.support.experts import PeftCase
from tests.support.numerics import relative_difference

COUNT = 9
KINDS = ("vit", "bert", "gpt2")
EXACT = {torch.float32: 1e-4, torch.float64: 1e-9}


def nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p(y|x) of each example."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scores = model(**inputs).logits.log_softmax(1)
    picked: Tensor = -scores[torch.arange(len(scores)), batch["labels"]]
    return picked


def by_loop(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], singles: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean over examples of the squared gradient of each: the definition."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for single in singles:
        gradients = torch.autograd.grad(nll(model, single).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient**2
    return {name: value / len(singles) for name, value in sums.items()}


@dataclass
class Case:
    """A PEFT model with its factors, some examples, and their Fisher by the loop."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    examples: Examples
    reference: dict[str, Tensor]

    def fisher(self, batches: Sequence[Sequence[int]]) -> Fisher:
        return diagonal_fisher(self.model, self.parameters, batches, self.examples.batch, nll)


MakeCase = Callable[..., Case]


@pytest.fixture(scope="module")
def make_case(peft_case: PeftCase) -> MakeCase:
    """``make_case(kind, dtype, **config)``: a case on a tiny model."""

    def make(kind: str, dtype: torch.dtype = torch.float32, **config: object) -> Case:
        model, examples, singles = peft_case(kind, COUNT, dtype, **config)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return Case(model, parameters, examples, by_loop(model, parameters, singles))

    return make


@pytest.fixture(scope="module")
def cases(make_case: MakeCase) -> dict[str, Case]:
    """One case per kind of model, with biases in the factors."""
    return {kind: make_case(kind, lora_bias=True) for kind in KINDS}


def assert_exact(found: Fisher, case: Case, tolerance: float) -> None:
    assert found.diagonal.keys() == case.reference.keys()
    assert found.examples == COUNT
    for name, value in case.reference.items():
        assert relative_difference(found.diagonal[name], value) < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(COUNT)), size=st.integers(1, COUNT))
def test_fisher_is_the_loop_for_any_order_batch_size_and_padding(
    cases: dict[str, Case], kind: str, order: list[int], size: int
) -> None:
    found = cases[kind].fisher([order[start : start + size] for start in range(0, COUNT, size)])
    assert found.route == "rules", found.why_loop
    assert_exact(found, cases[kind], EXACT[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(batch_tokens=st.integers(1, 150))
def test_fisher_is_the_loop_for_any_batch_tokens(cases: dict[str, Case], kind: str, batch_tokens: int) -> None:
    found = cases[kind].fisher(bucket_by_length(cases[kind].examples.lengths, batch_tokens))
    assert found.route == "rules"
    assert_exact(found, cases[kind], EXACT[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_exact_in_float64(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind, torch.float64, lora_bias=True)
    found = case.fisher([[4, 0, 7, 1], [2, 3, 5, 6, 8]])
    assert found.route == "rules"
    assert {value.dtype for value in found.diagonal.values()} == {torch.float64}
    assert_exact(found, case, EXACT[torch.float64])


def test_texts_of_the_cases_need_padding(cases: dict[str, Case]) -> None:
    assert len(set(cases["bert"].examples.lengths)) > 4


def test_fisher_is_not_the_square_of_the_mean_gradient(cases: dict[str, Case]) -> None:
    case = cases["vit"]
    loss = nll(case.model, case.examples.batch(range(COUNT))).mean()
    gradients = torch.autograd.grad(loss, list(case.parameters.values()))
    of_mean = torch.cat([gradient.square().flatten() for gradient in gradients])
    fisher = torch.cat([value.flatten() for value in case.fisher([range(COUNT)]).diagonal.values()])
    assert of_mean.sum() < 0.8 * fisher.sum()
    assert relative_difference(of_mean, fisher) > 0.2


def test_dropout_is_off(make_case: MakeCase) -> None:
    without = make_case("vit").fisher([range(COUNT)]).diagonal
    with_dropout = make_case("vit", lora_dropout=0.5).fisher([range(COUNT)]).diagonal
    for name, value in without.items():
        torch.testing.assert_close(with_dropout[name], value, rtol=0, atol=0)


def test_the_base_gets_no_gradient_and_no_parameter_keeps_one(cases: dict[str, Case]) -> None:
    for case in cases.values():
        case.fisher([range(COUNT)])
        assert all(parameter.grad is None for parameter in case.model.parameters())


def test_lora_on_embeddings_falls_to_the_loop_and_is_exact(make_case: MakeCase) -> None:
    case = make_case("bert", target_modules=["word_embeddings", "query"])
    found = case.fisher([[8, 1, 2, 3], [0, 4, 5, 6, 7]])
    assert found.route == "loop"
    assert "lora_embedding" in found.why_loop
    assert_exact(found, case, EXACT[torch.float32])


def test_a_layer_that_somebody_patched_falls_to_the_loop_and_keeps_its_patch(make_case: MakeCase) -> None:
    case = make_case("vit")
    layer = next(module for name, module in case.model.named_modules() if name.endswith("lora_B.default"))

    def doubled(module: nn.Linear, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, module.weight, module.bias)

    layer.forward = partial(doubled, layer)
    patched = Case(case.model, case.parameters, case.examples, {})
    patched.reference = by_loop(case.model, case.parameters, [case.examples.batch([i]) for i in range(COUNT)])
    found = patched.fisher([range(COUNT)])
    assert found.route == "loop"
    assert "lora_B.default.weight" in found.why_loop
    assert_exact(found, patched, EXACT[torch.float32])
    assert layer.forward.func is doubled


class Twice(nn.Module):
    """One layer used twice for each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(self.layer(x).tanh()))


class OverTime(nn.Module):
    """A layer whose input has time first and the examples second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(torch.stack([x, x.square()])).sum(0))


class Flat(nn.Module):
    """A layer whose input has neither time nor channels besides its width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(x))


@pytest.mark.parametrize(("model", "route"), [(Twice(), "loop"), (OverTime(), "loop"), (Flat(), "rules")])
def test_a_layer_of_any_use_is_exact(model: nn.Module, route: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(COUNT, 3, generator=generator), torch.arange(COUNT) % 3
    parameters = dict(model.named_parameters())

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        return {"x": x[list(indices)], "labels": labels[list(indices)]}

    found = diagonal_fisher(model, parameters, [range(4), range(4, COUNT)], batch, nll)
    assert found.route == route
    for name, value in by_loop(model, parameters, [batch([i]) for i in range(COUNT)]).items():
        assert relative_difference(found.diagonal[name], value) < EXACT[torch.float32]


def test_a_parameter_that_the_loss_does_not_see_has_the_fisher_zero() -> None:
    model = Flat()
    model.unused = nn.Linear(2, 2)
    x, labels = torch.ones(4, 3), torch.tensor([0, 1, 2, 0])
    batch = lambda ids: {"x": x[list(ids)], "labels": labels[list(ids)]}  # noqa: E731
    found = diagonal_fisher(model, dict(model.named_parameters()), [range(4)], batch, nll)
    assert found.diagonal["unused.weight"].tolist() == [[0, 0], [0, 0]]
    assert found.diagonal["layer.weight"].sum() > 0


def test_squares_of_a_sixteen_bit_layer_are_summed_in_float32() -> None:
    model = Flat().to(torch.bfloat16)
    count = 1500
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    labels = torch.arange(count) % 3
    parameters = dict(model.named_parameters())

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        return {"x": x[list(indices)], "labels": labels[list(indices)]}

    found = diagonal_fisher(model, parameters, [[i] for i in range(count)], batch, nll)
    wide = Flat()
    wide.load_state_dict(model.state_dict())
    singles = [{"x": x[i : i + 1].float(), "labels": labels[i : i + 1]} for i in range(count)]
    for name, value in by_loop(wide, dict(wide.named_parameters()), singles).items():
        assert relative_difference(found.diagonal[name], value) < 0.02


def test_progress_counts_every_example_once() -> None:
    seen: list[tuple[str, int, str]] = []
    steps: list[int] = []

    @contextmanager
    def track(description: str, total: int, unit: str) -> Iterator[Advance]:
        seen.append((description, total, unit))
        yield lambda step=1, note="": steps.append(step)

    x, labels = torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
    batch = lambda ids: {"x": x[list(ids)], "labels": labels[list(ids)]}  # noqa: E731
    model = Flat()
    diagonal_fisher(model, dict(model.named_parameters()), [[0, 1, 2], [3, 4]], batch, nll, track=track)
    assert seen == [("Fisher", 5, "examples")]
    assert steps == [3, 2]
