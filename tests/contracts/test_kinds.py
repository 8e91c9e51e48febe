"""Laws that every kind of expert in the folder's listing keeps, on experts that PEFT wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.adapters.kind import KINDS
from tests.support.bases import model_for
from tests.support.experts import RELATIVES, MakeExpert
from tests.support.numerics import logits_of

Run = Callable[..., Any]
NAMES = [name.replace("-", "_") for name in KINDS.names()]


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def experts(make_expert: MakeExpert, bert_base: Path, text_task: Path, kind: str, tmp_path: Path) -> list[Path]:
    return [make_expert(tmp_path / f"x{seed}", bert_base, text_task, kind=kind, seed=seed) for seed in range(2)]


def answers(base: Path, expert: Path) -> Tensor:
    """What PEFT alone makes of an expert."""
    ids = torch.randint(4, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return logits_of(PeftModel.from_pretrained(model_for(base), expert).eval(), batch)


def test_every_number_that_was_trained_has_its_place(experts: list[Path], kind: str) -> None:
    expert = open_expert(experts[0], convert=True)
    file = load_file(experts[0] / "adapter_model.safetensors")
    not_trained = {key for key in file if re.search(r"shira_indices|delora_w_norm|unilora_(indices|scales)", key)}
    assert set(expert.keys) | set(expert.head.values()) | not_trained == set(file)
    assert expert.parameters == sum(file[key].numel() for key in expert.keys)
    assert bool(expert.modules) != bool(expert.tensor_sets)
    assert bool(expert.modules) == expert.strategy.has_update
    assert expert.is_computed == (kind in RELATIVES)


def test_one_expert_at_weight_1_answers_as_it_is(experts: list[Path], bert_base: Path, cli: Run, kind: str) -> None:
    result = cli("merge", experts[0], "--base", bert_base, "--output", "one")  # a single one is its own target
    assert result.exit_code == 0, result.exception
    torch.testing.assert_close(answers(bert_base, Path("one")), answers(bert_base, experts[0]))
    again = open_expert("one")
    assert again.kind == ("lora" if kind in RELATIVES else open_expert(experts[0], convert=True).kind)
    if kind not in RELATIVES:
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (experts[0], Path("one")))
        for key in again.keys if again.tensor_sets else ():
            torch.testing.assert_close(after[key], before[key])


def test_copies_with_weights_that_sum_to_1_answer_as_the_one(
    experts: list[Path], bert_base: Path, cli: Run, kind: str
) -> None:
    copies = [experts[0]] * 3
    weights = ("--method", "interpolated", "--weights", "0.5,0.2,0.3")
    result = cli("merge", *copies, *weights, "--base", bert_base, "--target", experts[0], "--output", "copies")
    assert result.exit_code == 0, result.exception
    torch.testing.assert_close(answers(bert_base, Path("copies")), answers(bert_base, experts[0]))


def test_a_merge_has_the_same_bytes_again_and_loads_with_peft(experts: list[Path], bert_base: Path, cli: Run) -> None:
    for output in ("first", "second"):
        result = cli("merge", *experts, "--base", bert_base, "--target", experts[0], "--output", output)
        assert result.exit_code == 0, result.exception
    first, second = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert answers(bert_base, Path("first")).isfinite().all()
    assert not torch.equal(answers(bert_base, Path("first")), answers(bert_base, experts[0]))
