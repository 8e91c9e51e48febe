"""Merges number by number against sums by hand, and the laws of merging for every kind without ΔW."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, open_method
from pimerge.merging.tensor_merge import prepare_tensors
from tests.support.bases import inputs, model_for
from tests.support.experts import KINDS, MakeExpert, edit_tensors
from tests.support.numerics import logits_of

Run = Callable[..., Any]


def merged(folders: list[Path], method: str, weights: list[float], **options: Any) -> dict[str, Tensor]:
    experts = [open_expert(folder) for folder in folders]
    each = dict.fromkeys(experts[0].tensor_sets, weights)
    fisher = (lambda expert, key: torch.ones(expert.file.entries[key].shape)) if method == "fisher" else None
    return prepare_tensors(experts, each, open_method(method, options), fisher=fisher).tensors()


@pytest.fixture
def pool(make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path) -> Callable[[str], list[Path]]:
    def make(kind: str) -> list[Path]:
        return [make_expert(tmp_path / kind / str(n), bert_base, text_task, kind=kind, seed=n) for n in range(3)]

    return make


def neutral_of(key: str, bert_base: Path) -> Tensor | float:
    """What changes nothing, by hand."""
    if "ia3_l" in key:
        return 1.0
    if "ln_tuning" in key or "bitfit" in key:
        name = key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "").replace("bitfit_bias", "bias")
        return model_for(bert_base).get_parameter(name).detach()
    return 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_tensors_around_what_changes_nothing(
    pool: Callable[[str], list[Path]], bert_base: Path, kind: str
) -> None:
    folders = pool(kind)
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    keys = open_expert(folders[0]).keys
    mean = merged(folders, "uniform", [1 / 3] * 3)
    halves = merged(folders, "interpolated", [0.5, 0.25, 0.1])
    assert sorted(mean) == sorted(halves) == keys
    for key in keys:
        tensors = [file[key] for file in files]
        torch.testing.assert_close(mean[key], sum(tensors) / 3)
        zero = neutral_of(key, bert_base)
        expected = zero + sum(w * (t - zero) for w, t in zip([0.5, 0.25, 0.1], tensors, strict=True))
        torch.testing.assert_close(halves[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_and_copies_of_it_come_back_bit_for_bit(
    pool: Callable[[str], list[Path]], kind: str, dtype: torch.dtype
) -> None:
    first = pool(kind)[0]
    edit_tensors(first, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    file = load_file(first / "adapter_model.safetensors")
    for method in ("uniform", "interpolated", "task-arithmetic", "fisher", "nan-weights"):
        for copies, weights in ((1, [1.0]), (3, [0.25, 0.5, 0.25])):
            if method == "uniform" and copies > 1:
                weights = [1 / 3] * 3
            found = merged([first] * copies, method, weights)
            for key, tensor in found.items():
                assert tensor.dtype == dtype
                assert torch.equal(tensor, file[key]), (method, copies, key)


ANY_TENSOR = [method.name for method in METHODS if method.space.takes_any_tensor]
"""Methods that merge tensors without a ΔW."""


def weights_for(method: str) -> list[float]:
    """One weight for each of as many experts as a method takes, with sum 1 where it takes weights."""
    if method == "slerp":
        return [0.5, 0.5]
    with suppress(PimergeError):
        return list(open_method(method).weights(3, [0.5, 0.25, 0.25]))
    return list(open_method(method).weights(3, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted({*METHODS.names()} - {*ANY_TENSOR}))
def test_methods_that_need_an_update_are_refused_by_name(
    pool: Callable[[str], list[Path]], kind: str, method: str
) -> None:
    with pytest.raises(PimergeError, match=f"'{method}' needs .* have no ΔW"):
        merged(pool(kind), method, [1 / 3] * 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ANY_TENSOR)
def test_a_merge_of_tensors_is_the_same_again_and_finite(
    pool: Callable[[str], list[Path]], kind: str, method: str
) -> None:
    weights = weights_for(method)
    folders = pool(kind)[: len(weights)]
    found, again = (merged(folders, method, weights) for _ in range(2))
    assert found
    for key, tensor in found.items():
        assert torch.equal(tensor, again[key])
        assert tensor.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in ANY_TENSOR if "order" not in METHODS.load(name).breaks])
def test_the_order_of_the_experts_does_not_matter(pool: Callable[[str], list[Path]], kind: str, method: str) -> None:
    weights = weights_for(method)
    folders = pool(kind)[: len(weights)]
    turned = merged(folders[::-1], method, weights[::-1])
    for key, tensor in merged(folders, method, weights).items():
        torch.testing.assert_close(turned[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in ANY_TENSOR if "copies" not in METHODS.load(name).breaks])
def test_copies_with_weights_of_sum_one_give_the_expert(
    pool: Callable[[str], list[Path]], kind: str, method: str
) -> None:
    weights = weights_for(method)
    assert sum(weights) == pytest.approx(1)
    folder = pool(kind)[0]
    file = load_file(folder / "adapter_model.safetensors")
    for key, tensor in merged([folder] * len(weights), method, weights).items():
        torch.testing.assert_close(tensor, file[key], rtol=1e-4, atol=1e-6)


def test_the_projections_of_a_position_share_one_coefficient_and_so_does_a_prefixs_layer(
    pool: Callable[[str], list[Path]],
) -> None:
    for kind in ("bottleneck", "prefix"):
        experts = [open_expert(folder) for folder in pool(kind)[:2]]
        weights = {name: [0.1 * number, 1 - 0.1 * number] for number, name in enumerate(experts[0].tensor_sets)}
        found = prepare_tensors(experts, weights, open_method("interpolated")).tensors()
        for name, group in experts[0].tensor_sets.items():
            for slot in group.slots.values():
                a, b = (expert.tensor(slot.key) for expert in experts)
                expected, given = weights[name][0] * a + weights[name][1] * b, found[slot.key]
                if slot.columns:
                    expected, given = expected[:, slice(*slot.columns)], given[:, slice(*slot.columns)]
                torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_loads_with_peft_and_answers_as_the_mean_made_by_hand(
    pool: Callable[[str], list[Path]], bert_base: Path, cli: Run, kind: str, tmp_path: Path
) -> None:
    folders = pool(kind)
    assert cli("merge", *folders[:2], "--target", folders[0], "--output", "out").exit_code == 0
    found = PeftModel.from_pretrained(model_for(bert_base), tmp_path / "out").eval()
    other = load_file(folders[1] / "adapter_model.safetensors")

    def mean(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: (tensors[key] + other[key]) / 2 for key in open_expert(folders[0]).keys})

    edit_tensors(folders[0], mean)
    by_hand = PeftModel.from_pretrained(model_for(bert_base), folders[0]).eval()
    torch.testing.assert_close(logits_of(found, inputs("bert")), logits_of(by_hand, inputs("bert")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("import pimerge.peft_methods" in card) == (kind in ("bitfit", "bottleneck"))
    assert cli("eval", "out", "--target", folders[0]).exit_code == 0
    again = cli("merge", *folders[:2], "--target", folders[0], "--output", "again")
    assert again.exit_code == 0


def test_what_does_not_fit_is_refused(
    make_expert: MakeExpert,
    pool: Callable[[str], list[Path]],
    bert_base: Path,
    text_task: Path,
    cli: Run,
    tmp_path: Path,
) -> None:
    ia3, prefix = pool("ia3"), pool("prefix")
    lora = make_expert(tmp_path / "lora", bert_base, text_task)
    wider = make_expert(tmp_path / "wider", bert_base, text_task, kind="bottleneck", bottleneck_dim=5)
    louder = make_expert(tmp_path / "louder", bert_base, text_task, kind="bottleneck", scale=2.0)
    for given, named in (
        ([ia3[0], lora], "is of kind"),
        ([lora, ia3[0]], "is of kind"),
        ([pool("bottleneck")[0], wider], "other shapes"),
        ([pool("bottleneck")[0], louder], "its scale is 2"),
        ([*ia3, "--rank", "2"], "--rank applies to updates"),
        ([*ia3, "--verify", "--space", "delta"], "--verify applies to updates"),
        ([*ia3, "--method", "tsv"], "singular vectors"),
        ([*prefix, "--exclude", "layers.0"], "cannot be left out"),
        ([*ia3, "--method", "fisher"], "no store"),
    ):
        result = cli("merge", *given, "--head", "none", "--output", "out")
        assert isinstance(result.exception, PimergeError), given
        assert any(named in str(problem) for problem in [result.exception, *result.exception.problems]), (
            result.exception
        )
        assert not (tmp_path / "out").exists()


def test_what_is_left_out_stays_as_in_the_base(pool: Callable[[str], list[Path]], cli: Run, tmp_path: Path) -> None:
    folders = pool("ia3")
    assert cli("merge", *folders, "--head", "none", "--exclude", "*layer.0*", "--output", "out").exit_code == 0
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert bool((tensor == 1).all()) == (".layer.0." in key)


def test_fisher_weights_every_number_by_the_stores(pool: Callable[[str], list[Path]], cli: Run, tmp_path: Path) -> None:
    from pimerge.embedding.store import Store

    folders = pool("ln_tuning")
    assert cli("embed", tmp_path / "ln_tuning").exit_code == 0
    assert (
        cli("merge", *folders[:2], "--method", "fisher", "--head", "none", "--floor", "0", "--output", "out").exit_code
        == 0
    )
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    store = Store(tmp_path / "embeddings.json")
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders[:2]]
    fishers = [store.diagonal(name) for name in ("0", "1")]
    for key, tensor in found.items():
        total = sum(fisher[key].double() for fisher in fishers)
        expected = (
            sum(fisher[key].double() * file[key].double() for fisher, file in zip(fishers, files, strict=True)) / total
        )
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-4, atol=1e-6)
