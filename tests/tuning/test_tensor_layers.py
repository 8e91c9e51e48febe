"""Tuning of experts without ΔW: what the composition computes, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.tuning.mixture import FreeMixture, Mixture
from pimerge.tuning.tensor_layers import MixedTensor, component_of, fresh_component, mix_tensors
from tests.support.bases import inputs, loaded_base, model_for
from tests.support.experts import KINDS, MakeExpert
from tests.support.numerics import logits_of

Run = Callable[..., Any]
METHODS = ("learned", "interpolated", "uniform", "scratch", "head")
QUICK = ("--epochs", "2", "--batch-size", "8", "--holdout", "0.25")


@pytest.fixture
def pool(make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path) -> Callable[[str], list[Path]]:
    def make(kind: str) -> list[Path]:
        return [make_expert(tmp_path / f"{kind}{n}", bert_base, text_task, kind=kind, seed=n) for n in range(3)]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_the_weighted_sum_and_gradients_reach_weights_and_tensors(
    pool: Callable[[str], list[Path]], bert_base: Path, kind: str
) -> None:
    folders = pool(kind)
    experts = [open_expert(folder) for folder in folders]
    loaded, batch = loaded_base(bert_base), inputs("bert")
    components = [component_of(expert, loaded) for expert in experts]
    mixture = Mixture(experts[0].parts, [0.0, 1.0, -1.0], "matrix", trained=True)
    with torch.no_grad():
        mixture.logits += torch.arange(len(mixture.logits))[:, None] * torch.tensor([0.3, 0.0, -0.2])
    composition = mix_tensors(loaded, experts[0], components, mixture, trained=True)
    found = composition.model(**batch).logits
    collapsed = composition.collapsed()
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name, group in experts[0].tensor_sets.items():
        weights = mixture(name).detach()
        for slot in group.slots.values():
            part = slice(*slot.columns) if slot.columns else slice(None)
            expected = sum(w * file[slot.key][..., part] for w, file in zip(weights, files, strict=True))
            torch.testing.assert_close(collapsed[slot.key][..., part], expected)
    by_hand = PeftModel.from_pretrained(model_for(bert_base), folders[0]).eval()
    key_of = {name.replace(".default", ""): parameter for name, parameter in by_hand.named_parameters()}
    with torch.no_grad():
        for key, tensor in collapsed.items():
            key_of["prompt_encoder.embedding.weight" if key == "prompt_embeddings" else key].copy_(tensor)
        for name, parameter in loaded.head_tensors().items():
            owner, _, last = name.rpartition(".")
            wrapper = by_hand.get_base_model().get_submodule(owner)
            getattr(wrapper.modules_to_save["default"], last).copy_(parameter)
    torch.testing.assert_close(found.detach(), logits_of(by_hand, batch))
    found.square().sum().backward()
    assert mixture.logits.grad is not None
    assert mixture.logits.grad.abs().sum() > 0
    stacks = [each.stack.grad for each in composition.mixed.values()]
    assert all(grad is not None for grad in stacks)
    assert sum(float(grad.abs().sum()) for grad in stacks if grad is not None) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_is_as_peft_makes_it(pool: Callable[[str], list[Path]], bert_base: Path, kind: str) -> None:
    expert = open_expert(pool(kind)[0])
    loaded, batch = loaded_base(bert_base), inputs("bert")
    before = logits_of(loaded.model, batch)
    one, same, other = (fresh_component(expert, loaded, seed).tensors for seed in (3, 3, 4))
    assert sorted(one) == expert.keys
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert torch.equal(logits_of(loaded.model, batch), before)
    differ = any(not torch.equal(one[key], other[key]) for key in one)
    assert differ == (kind in ("bottleneck", "prefix", "prompt"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_exports_one_expert_that_answers_as_it_was_tuned(
    pool: Callable[[str], list[Path]], bert_base: Path, cli: Run, kind: str, method: str, tmp_path: Path
) -> None:
    folders = pool(kind)
    mixed = folders[1:] if method in ("learned", "interpolated", "uniform") else []
    result = cli("tune", *mixed, "--method", method, "--target", folders[0], "--output", "out", *QUICK, "--json")
    assert result.exit_code == 0, result.exception
    expert = open_expert(tmp_path / "out")
    is_lora = method == "head" and kind in ("prefix", "prompt")
    assert expert.kind == ("lora" if is_lora else kind.replace("_", "-"))
    assert expert.head
    scored = cli("eval", "out", "--target", folders[0], "--json")
    assert scored.exit_code == 0, scored.exception
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    if method == "uniform":
        others = [load_file(folder / "adapter_model.safetensors") for folder in folders[1:]]
        for key in expert.keys:
            torch.testing.assert_close(file[key], sum(other[key] for other in others) / 2)
    if method in ("learned", "interpolated"):
        weights = json.loads((tmp_path / "out" / "coefficients.json").read_text())["weights"]
        assert sorted(weights) == sorted(expert.parts)
        assert all(abs(sum(row) - 1) < 1e-6 for row in weights.values())
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = expert.config.get(name)
        assert not isinstance(value, list) or value == sorted(value)  # PEFT's own order is another in each process
    again = cli("tune", *mixed, "--method", method, "--target", folders[0], "--output", "two", *QUICK, "--json")
    assert again.exit_code == 0
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_prefix_has_one_vector_per_layer_and_a_bottleneck_one_per_position(
    pool: Callable[[str], list[Path]], cli: Run, tmp_path: Path
) -> None:
    for kind, count in (("prefix", 2), ("bottleneck", 4)):
        folders = pool(kind)
        assert cli("tune", *folders[:2], "--target", folders[2], "--output", f"out-{kind}", *QUICK).exit_code == 0
        weights = json.loads((tmp_path / f"out-{kind}" / "coefficients.json").read_text())["weights"]
        assert len(weights) == count


def test_what_cannot_be_tuned_is_refused(pool: Callable[[str], list[Path]], cli: Run, tmp_path: Path) -> None:
    ia3, lora = pool("ia3"), pool("lora")
    for given, named in (
        ([ia3[0], lora[0], "--target", ia3[1]], "is of kind"),
        ([ia3[0], "--method", "interpolated", "--target", lora[0]], "is of kind"),
        ([*ia3[:2], "--target", ia3[2], "--rank", "2"], "--rank is for updates"),
    ):
        result = cli("tune", *given, "--output", "out", *QUICK)
        assert isinstance(result.exception, PimergeError), given
        assert any(named in str(problem) for problem in [result.exception, *result.exception.problems])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_text_behind_a_prompt(
    make_expert: MakeExpert, gpt2_base: Path, text_task: Path, side: str, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "x", gpt2_base, text_task, kind="prompt", head=False))
    loaded = loaded_base(gpt2_base)
    mixture = Mixture(expert.parts, [0.0], "matrix", trained=False)
    model = mix_tensors(loaded, expert, [component_of(expert, loaded)], mixture, trained=True).model
    texts = [torch.arange(4, 4 + length) for length in (3, 5, 2, 5)]
    pad = (lambda x: (5 - len(x), 0)) if side == "left" else (lambda x: (0, 5 - len(x)))
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(text, pad(text)) for text in texts]),
        "attention_mask": torch.stack([torch.nn.functional.pad(torch.ones_like(t), pad(t)) for t in texts]),
    }
    by_peft = PeftModel.from_pretrained(model_for(gpt2_base), tmp_path / "x").eval()
    wrapper = by_peft.get_base_model().score
    wrapper.modules_to_save["default"].load_state_dict(loaded.model.score.state_dict())
    alone = [logits_of(by_peft, {"input_ids": t[None], "attention_mask": torch.ones_like(t)[None]})[0] for t in texts]
    torch.testing.assert_close(logits_of(model, batch), torch.stack(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_expert_of_a_kind_is_trained_for_a_task_alone(
    bert_base: Path, text_task: Path, cli: Run, kind: str, tmp_path: Path
) -> None:
    sized = {"bottleneck": (("down.weight", 0), 3), "prefix": (("prompt_embeddings", 0), 3)}
    size = ["--fresh-rank", "3"] if kind in sized or kind == "prompt" else []
    line = ("--method", "scratch", "--kind", kind.replace("_", "-"), "--target", text_task, "--base", bert_base)
    result = cli("tune", *line, *size, *QUICK)
    assert result.exit_code == 0, result.exception
    expert = open_expert(tmp_path / "tuned")
    assert expert.kind == kind.replace("_", "-")
    model = PeftModel.from_pretrained(model_for(bert_base), tmp_path / "tuned").eval()
    assert not torch.equal(logits_of(model, inputs("bert")), logits_of(model_for(bert_base), inputs("bert")))
    if kind in sized:
        (ending, axis), expected = sized[kind]
        shapes = {entry.shape[axis] for key, entry in expert.file.entries.items() if key.endswith(ending)}
        assert shapes == {expected}


def test_a_fresh_kind_that_cannot_be_is_refused(
    pool: Callable[[str], list[Path]], vit_base: Path, bert_base: Path, parity_task: Path, text_task: Path, cli: Run
) -> None:
    ia3 = pool("ia3")
    text, scans = ("--target", text_task, "--base", bert_base), ("--target", parity_task, "--base", vit_base)
    scratch = ("--method", "scratch", "--kind")
    for given, named in (
        ((*scratch, "prefix", *scans), "a prefix is put before a text, but ViTForImageClassification"),
        ((*scratch, "prompt", *scans), "a prompt is put before a text"),
        ((*scratch, "bottle", *text), "did you mean 'bottleneck'"),
        ((*scratch, "ia3", "--fresh-rank", "3", *text), "this kind of expert has no size"),
        ((*scratch, "prefix", "--modules", "query", *text), "is put before the text"),
        ((*scratch, "bottleneck", "--modules", "nowhere", *text), "cannot be put into BertForSequenceClassification"),
        ((*scratch, "bottleneck", "--fresh-alpha", "3", *text), "--fresh-alpha is for LoRA"),
        (("--method", "head", "--kind", "bottleneck", *text), "'head' does not train one"),
        ((ia3[0], "--kind", "bottleneck", "--target", ia3[1]), "'guided' does not train one"),
    ):
        result = cli("tune", *given, "--output", "out", *QUICK)
        assert isinstance(result.exception, PimergeError), (given, result.exception)
        found = [str(problem) for problem in [result.exception, *result.exception.problems]]
        assert any(named in text for text in found), (given, found)


def test_a_fresh_lora_is_trained_beside_a_pool_of_another_kind(
    pool: Callable[[str], list[Path]], cli: Run, tmp_path: Path
) -> None:
    assert cli("tune", "--method", "scratch", "--kind", "lora", "--target", pool("ia3")[0], *QUICK).exit_code == 0
    assert open_expert(tmp_path / "tuned").kind == "lora"


@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.0, 0.0], [1.0, 0.0], [0.9, -1.4]])
def test_weights_that_do_not_sum_to_one_lead_to_what_changes_nothing(weights: list[float]) -> None:
    """φ0 + Σ α_n (φ_n − φ0), each group of columns with its own α."""
    stack, neutral = torch.randn(2, 3, 4), torch.randn(3, 4)
    mixture = FreeMixture(["left", "right"], [0.0, 0.0], "matrix", True)
    with torch.no_grad():
        mixture.logits[0].copy_(torch.tensor(weights))
        mixture.logits[1].copy_(torch.tensor(weights[::-1]))
    mixed = MixedTensor(stack, neutral, {"left": (0, 1), "right": (1, 4)}, mixture, True)
    expected = neutral.clone()
    for index in range(2):
        expected[:, :1] += weights[index] * (stack[index] - neutral)[:, :1]
        expected[:, 1:] += weights[1 - index] * (stack[index] - neutral)[:, 1:]
    torch.testing.assert_close(mixed(torch.zeros(3, 4)).detach(), expected)
    g = torch.randn(3, 4)
    found = torch.autograd.grad(mixed(torch.zeros(3, 4)), [mixture.logits, mixed.stack], g)
    slopes = (g * (stack - neutral)).sum(1)  # of each expert and column
    torch.testing.assert_close(found[0], torch.stack([slopes[:, 0], slopes[:, 1:].sum(1)]))
    share = torch.tensor([weights, weights[::-1], weights[::-1], weights[::-1]]).T[:, None]  # expert × 1 × column
    torch.testing.assert_close(found[1], share * g)
