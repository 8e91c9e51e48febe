"""Experts in a base and out of it again, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.models.heads import set_head
from pimerge.models.injection import injected, injected_sum
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.loading import load, pixels, require_same, state_of
from tests.support.numerics import logits_of, relative_difference


def test_an_injected_expert_gives_pefts_model_and_the_base_is_restored(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    for seed in (1, 2):
        folder = make_expert(tmp_path / str(seed), vit_base, parity_task, seed=seed)
        expected = PeftModel.from_pretrained(model_for(vit_base), folder).eval()
        with injected(open_expert(folder), loaded) as model:
            assert torch.equal(logits_of(model, pixels()), logits_of(expected, pixels()))
        after = loaded.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_base_is_restored_after_an_error(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    expected = logits_of(loaded.model, pixels())
    expert = open_expert(make_expert(tmp_path / "a", vit_base))
    with pytest.raises(KeyboardInterrupt), injected(expert, loaded):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(loaded.model, pixels()), expected)


def test_a_sum_of_one_is_pefts_model_under_the_bases_own_head(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    folder = make_expert(tmp_path / "a", vit_base, parity_task, use_rslora=True)
    expected = PeftModel.from_pretrained(model_for(vit_base), folder).eval()
    set_head(expected, loaded.head_tensors())
    with injected_sum([open_expert(folder)], [1.0], loaded) as model:
        assert torch.equal(logits_of(model, pixels()), logits_of(expected, pixels()))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_a_sum_of_several_is_the_dense_sum_and_the_base_is_restored(
    request: pytest.FixtureRequest, kind: str, make_expert: MakeExpert, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_base")
    task: Path = request.getfixturevalue("parity_task" if kind == "vit" else "text_task")
    loaded = load(base, task)
    before = state_of(loaded)
    modules = {"vit": ["k_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    experts = [
        open_expert(make_expert(tmp_path / "a", base, task)),
        open_expert(make_expert(tmp_path / "b", base, task, seed=1, r=2, lora_alpha=3, head=False)).with_strength(0.25),
        open_expert(make_expert(tmp_path / "c", base, task, seed=2, r=3, target_modules=modules)).with_strength(0.5),
    ]
    weights = [0.5, 1.5, -1.0]
    dense = load(base, task).model
    with torch.no_grad():
        for expert, weight in zip(experts, weights, strict=True):
            for name, delta in dense_deltas(expert).items():  # at the expert's scale
                layer = dense.get_submodule(name)
                layer.weight += weight * (delta.T if type(layer).__name__ == "Conv1D" else delta)
    batch = pixels() if kind == "vit" else {"input_ids": torch.arange(4, 16).reshape(3, 4)}
    expected = logits_of(dense, batch)
    assert relative_difference(logits_of(loaded.model, batch), expected) > 1e-2
    for _ in range(2):  # PEFT notes its adapters in the base: none of the first time may be left
        with injected_sum(experts, weights, loaded) as model:
            assert relative_difference(logits_of(model, batch), expected) < 1e-5
        require_same(loaded, before)
    with pytest.raises(KeyboardInterrupt), injected_sum(experts[:2], [1.0, 1.0], loaded):
        raise KeyboardInterrupt
    require_same(loaded, before)


def test_every_expert_of_a_sum_is_checked_against_the_base(
    vit_base: Path, bert_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    loaded = load(vit_base, parity_task)
    fits, stranger = (
        open_expert(make_expert(tmp_path / "a", vit_base)),
        open_expert(make_expert(tmp_path / "b", bert_base)),
    )
    with (
        pytest.raises(PimergeError, match="the base has no module 'bert"),
        injected_sum([fits, stranger], [1, 1], loaded),
    ):
        pass
