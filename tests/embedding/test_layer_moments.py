"""Second moments of the Fisher information against a loop over single examples and tokens, with autograd of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.adapters.keys import PREFIX
from pimerge.embedding import embed_expert as embedding
from pimerge.embedding.embed_expert import EmbedOptions, embed_expert
from pimerge.embedding.input_grams import linear_layers
from pimerge.embedding.layer_moments import SecondMoments
from pimerge.embedding.random_projection import DIRECTIONS, projection
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases
from pimerge.tasks.examples import Examples
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, PeftCase, edit_tensors
from tests.support.numerics import change_basis, relative_difference, small

COUNT = 7
ROUNDING = 1e-4
Batch = dict[str, Tensor]


def nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p(y|x) of each example."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scores = model(**inputs).logits.log_softmax(1)
    picked: Tensor = -scores[torch.arange(len(scores)), batch["labels"]]
    return picked


def by_loop(model: nn.Module, names: Sequence[str], singles: Sequence[Batch]) -> dict[str, Tensor]:
    """The means over all tokens of all examples, by ``autograd.grad`` of one unpadded example's loss at a time."""
    entering: dict[str, list[Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        entering[name].extend(args[0].detach().double().reshape(-1, args[0].shape[-1]))
        outputs[name] = output

    handles = [model.get_submodule(PREFIX + name).register_forward_hook(partial(keep, name)) for name in names]
    for single in singles:
        assert all(len(value) == 1 for value in single.values())
        found = torch.autograd.grad(nll(model, single).sum(), [outputs[name] for name in names])
        for name, gradient in zip(names, found, strict=True):
            gradients[name].extend(gradient.double().reshape(-1, gradient.shape[-1]))
    for handle in handles:
        handle.remove()
    means: dict[str, Tensor] = {}
    for name in names:
        tokens, width = len(gradients[name]), len(gradients[name][0])
        assert tokens == len(entering[name])
        seen = [projection(f"{name}.output", width).double().T @ g for g in gradients[name]]
        means[f"input.{name}"] = sum((x**2 for x in entering[name]), torch.tensor(0.0)) / tokens
        means[f"output.{name}"] = sum((g**2 for g in gradients[name]), torch.tensor(0.0)) / tokens
        means[f"gradient.{name}"] = sum((torch.outer(s, s) for s in seen), torch.tensor(0.0)) / tokens
    return means


@dataclass
class Case:
    """A PEFT model with its adapted layers, some examples, and their marginals by the loop."""

    model: nn.Module
    layers: dict[str, nn.Module]
    examples: Examples
    reference: dict[str, Tensor]

    def marginals(self, batches: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        found = SecondMoments({name: self.model.get_submodule(PREFIX + name) for name in self.layers})
        with found.recording():
            for indices in batches:
                nll(self.model, found.of(self.examples.batch(indices))).sum().backward()
        return found.means()


TARGETS = {"vit": ["q_proj", "fc1", "fc2"], "bert": ["query", "attention.output.dense"], "gpt2": ["c_attn", "c_proj"]}
MakeCase = Callable[..., Case]


@pytest.fixture(scope="module")
def make_case(peft_case: PeftCase) -> MakeCase:
    """``make_case(kind, dtype)``: a case on a tiny model."""

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Case:
        model, examples, singles = peft_case(kind, COUNT, dtype, target_modules=TARGETS[kind])
        names = [name.partition(".lora_A.")[0] for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
        layers = linear_layers(model, sorted(name.removeprefix(PREFIX) for name in names))
        return Case(model, layers, examples, by_loop(model, list(layers), singles))

    return make


@pytest.fixture(scope="module")
def cases(make_case: MakeCase) -> dict[str, Case]:
    return {kind: make_case(kind) for kind in TARGETS}


def assert_is_the_loops(found: Mapping[str, Tensor], case: Case, tolerance: float = ROUNDING) -> None:
    assert list(found) == sorted(case.reference)
    for name, value in case.reference.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == value.shape
        assert relative_difference(found[name], value) < tolerance, name


@pytest.mark.parametrize("kind", TARGETS)
@settings(small, max_examples=6)
@given(order=st.permutations(range(COUNT)), size=st.integers(1, COUNT))
def test_they_are_the_loops_for_any_order_batch_size_and_padding(
    cases: dict[str, Case], kind: str, order: list[int], size: int
) -> None:
    found = cases[kind].marginals([order[start : start + size] for start in range(0, COUNT, size)])
    assert_is_the_loops(found, cases[kind])


@pytest.mark.parametrize("kind", TARGETS)
def test_a_float64_model_is_exact_up_to_the_stored_float32(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind, torch.float64)
    assert_is_the_loops(case.marginals([[4, 0, 6, 1], [2, 3, 5]]), case, 2e-7)


def test_the_cases_have_what_they_are_to_test(cases: dict[str, Case]) -> None:
    assert len(set(cases["bert"].examples.lengths)) > 4  # so that batches are padded
    assert {type(layer).__name__ for layer in cases["gpt2"].layers.values()} == {"Conv1D"}
    assert cases["gpt2"].reference["input.transformer.h.0.mlp.c_proj"].shape == (64,)  # d_in, not d_out
    padded = cases["bert"].examples.batch(range(COUNT))
    singles = [{name: value[i : i + 1] for name, value in padded.items()} for i in range(COUNT)]
    spoilt = by_loop(cases["bert"].model, list(cases["bert"].layers), singles)
    name = "input.bert.encoder.layer.0.attention.self.query"
    assert relative_difference(spoilt[name], cases["bert"].reference[name]) > 0.01  # padding would show


def test_wide_layers_are_seen_in_few_directions(make_case: MakeCase) -> None:
    layer = nn.Linear(3, 100)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = SecondMoments({"q": layer})
    with found.recording():
        layer(x).sin().sum().backward()
    rows = layer(x).detach().cos()
    seen = rows @ projection("q.output", 100)
    assert found.means()["gradient.q"].shape == (DIRECTIONS, DIRECTIONS)
    torch.testing.assert_close(found.means()["gradient.q"], seen.T @ seen / 9)
    torch.testing.assert_close(found.means()["output.q"], rows.square().mean(0))


def test_hooks_are_gone_after_an_error_and_outputs_are_as_they_were(cases: dict[str, Case]) -> None:
    case = cases["vit"]
    wrappers = {name: case.model.get_submodule(PREFIX + name) for name in case.layers}
    batch = case.examples.batch([0, 1])
    plain = nll(case.model, batch)
    found = SecondMoments(wrappers)
    with found.recording():
        assert torch.equal(nll(case.model, found.of(batch)), plain)
    with pytest.raises(RuntimeError), found.recording():  # noqa: PT012
        nll(case.model, found.of(batch))
        raise RuntimeError
    assert not any(layer._forward_hooks for layer in wrappers.values())


def test_without_a_gradient_there_are_inputs_alone() -> None:
    layer = nn.Linear(2, 2)
    found = SecondMoments({"q": layer})
    with found.recording(), torch.no_grad():
        layer(torch.ones(3, 2))
    assert {name: value.tolist() for name, value in found.means().items()} == {"input.q": [1, 1]}


LIMIT = 9


def embedded(folder: Path, store: Path, **options: Any) -> dict[str, Tensor]:
    """What ``embed`` writes of one expert, besides its updates."""
    tokens, labels = options.get("batch_tokens"), options.get("labels", "true")
    expert, found = open_expert(folder), Store(store / "embeddings.json")
    bases = Bases(torch.device("cpu"), torch.float32)
    embed_expert(
        expert,
        check_expert(expert),
        found,
        EmbedSettings(max_examples=LIMIT, labels=labels),
        bases,
        EmbedOptions(tokens),
    )
    file = found.second_moments_file(expert.name)
    return {key: file.read(key) for key in file.entries if not key.startswith("update.")}


def reference(folder: Path, base: Path, *, sampled: bool = False) -> dict[str, Tensor]:
    """The loop over PEFT's own model, with true labels or with ones drawn by the examples' uniform numbers."""
    task = open_task(folder)
    model = PeftModel.from_pretrained(model_for(base), folder).eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    examples, _ = task.examples("train", task.type.load_processor(str(base), None), model.config, limit=LIMIT)
    singles = [examples.batch([index]) for index in range(LIMIT)]
    if sampled:
        uniform = torch.rand(LIMIT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for single, number in zip(singles, uniform, strict=True):
            with torch.no_grad():
                p = model(**{name: value for name, value in single.items() if name != "labels"}).logits[0].softmax(0)
            single["labels"] = (p.double().cumsum(0) < number).sum()[None]
    return by_loop(model, sorted(open_expert(folder).modules), singles)


@pytest.mark.parametrize("batch_tokens", [1, 40, None])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_embed_writes_those_of_the_unpadded_examples(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path, batch_tokens: int | None, labels: str
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, text_task)
    found = embedded(folder, tmp_path, batch_tokens=batch_tokens, labels=labels)
    expected = reference(folder, bert_base, sampled=labels == "sampled")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_difference(found[name], value) < ROUNDING, name


def test_sampled_labels_are_others_than_the_true_ones(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, text_task)
    true, sampled = reference(folder, bert_base), reference(folder, bert_base, sampled=True)
    assert max(relative_difference(sampled[name], true[name]) for name in true) > 0.01


def test_images_and_the_loop_route_give_the_same(
    make_expert: MakeExpert, vit_base: Path, parity_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_expert(tmp_path / "x", vit_base, parity_task)
    expected = reference(folder, vit_base)
    by_rules = embedded(folder, tmp_path / "rules")
    monkeypatch.setattr("pimerge.embedding.fisher._deviation", lambda *_: 1.0)  # as if the batched gradients were wrong
    by_singles = embedded(folder, tmp_path / "loop")
    assert Store(tmp_path / "loop" / "embeddings.json").experts["x"].route == "loop"
    for name, value in expected.items():
        assert relative_difference(by_rules[name], value) < ROUNDING, name
        assert relative_difference(by_singles[name], value) < ROUNDING, name


def test_the_basis_of_the_factors_is_not_in_them(
    make_expert: MakeExpert, vit_base: Path, parity_task: Path, tmp_path: Path
) -> None:
    basis = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    plain = embedded(make_expert(tmp_path / "plain" / "x", vit_base, parity_task), tmp_path / "plain")
    folder = make_expert(tmp_path / "turned" / "x", vit_base, parity_task)
    turned = embedded(edit_tensors(folder, lambda tensors: change_basis(tensors, basis)), tmp_path / "turned")
    for name, value in plain.items():
        assert relative_difference(turned[name], value) < 1e-3, name
    diagonals = [Store(tmp_path / each / "embeddings.json").diagonal("x") for each in ("plain", "turned")]
    assert max(relative_difference(diagonals[1][key], diagonals[0][key]) for key in diagonals[0]) > 0.1


def test_a_layer_without_marginals_leaves_them_empty(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, text_task, target_modules=["word_embeddings"])
    assert embedded(folder, tmp_path) == {}
    assert embedding.SECOND_MOMENTS in Store(tmp_path / "embeddings.json").experts["x"].sidecars
