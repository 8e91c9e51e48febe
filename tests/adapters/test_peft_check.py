"""PEFT opens outputs against a skeleton of their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.expert import open_expert
from pimerge.adapters.peft_check import check_with_peft
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from tests.support.experts import KINDS, MakeExpert, raw_expert, set_config, set_tensors, updates_of


@pytest.mark.parametrize("kind", ["lora", *KINDS, "loha", "shira", "hira", "vblora", "unilora"])
def test_peft_opens_experts_of_every_kind_as_it_saved_them(
    kind: str, make_expert: MakeExpert, bert_base: Path, tmp_path: Path
) -> None:
    expert = make_expert(tmp_path / "expert", bert_base, kind=kind, task_type="SEQ_CLS")
    state = torch.random.get_rng_state()
    check_with_peft(expert, Base(str(bert_base), None, bert_base))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["t5", "gpt2-lm", "llama-lm"])
def test_peft_opens_experts_of_language_models(
    name: str, language_base: Callable[[str], Path], make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = make_expert(tmp_path / "expert", language_base(name))
    check_with_peft(expert, open_expert(expert).base)


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, dict[str, Any]] = {
    "it lacks": {"target_modules": ["q_proj"]},
    "it does not use": {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    "KeyError: 'base_model.model.lm_head.weight'": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_peft_says_is_passed_on(fault: str, language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    updates = updates_of({Q: (16, 2, 16), Q.replace("q_", "v_"): (8, 2, 16)})
    expert = raw_expert(tmp_path / "expert", updates, base_model_name_or_path=str(base), task_type="CAUSAL_LM")
    check_with_peft(expert, open_expert(expert).base)
    found = open_expert(expert).base
    set_config(expert, **FAULTS[fault])
    with pytest.raises(PimergeError, match=f"PEFT does not load it into LlamaForCausalLM: {fault}"):
        check_with_peft(expert, found)


def test_a_resized_vocabulary_is_no_fault(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    saved = {f"base_model.model.{name}.weight": torch.ones(500, 16) for name in ("model.embed_tokens", "lm_head")}
    expert = raw_expert(
        tmp_path / "expert",
        updates_of({Q: (16, 2, 16)}),
        saved,
        modules_to_save=["embed_tokens", "lm_head"],
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    check_with_peft(expert, open_expert(expert).base)


def test_a_base_that_transformers_does_not_know_is_not_judged(tmp_path: Path) -> None:
    expert = raw_expert(tmp_path / "expert", updates_of({"q": (4, 2, 4)}))
    check_with_peft(expert, open_expert(set_tensors(expert, {})).base)
