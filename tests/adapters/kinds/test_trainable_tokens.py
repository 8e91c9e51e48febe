"""Trained rows of an embedding: merged row by row against PEFT's models of the experts, also where tokens differ."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TrainableTokensConfig
from safetensors.torch import load_file

from pimerge import merge
from pimerge.adapters.compatibility import differing_form
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.experts import set_config
from tests.support.into_cases import adapted, llama, merged_into, opened, outputs

TOKENS = ([3, 7], [9, 3])


def experts_of(model: torch.nn.Module, folder: Path) -> list[Path]:
    """Two experts of other tokens."""
    for number, tokens in enumerate(TOKENS):
        config = TrainableTokensConfig(token_indices=tokens, task_type="CAUSAL_LM")
        adapted(model, config, folder / f"x{number}", folder / "base", seed=number)
    return [folder / "x0", folder / "x1"]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.9)])
def test_a_row_that_an_expert_did_not_train_is_the_bases(
    is_tied: bool, weights: tuple[float, float], tmp_path: Path
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=is_tied)
    experts = experts_of(base, tmp_path)
    wanted = copy.deepcopy(base)
    zero = base.get_input_embeddings().weight.detach()
    found = zero.clone()
    for expert, weight in zip(experts, weights, strict=True):
        own = PeftModel.from_pretrained(copy.deepcopy(base), expert).merge_and_unload()
        found += weight * (own.get_input_embeddings().weight.detach() - zero)
    wanted.get_input_embeddings().weight.data = found
    wanted.tie_weights()
    options = {"method": "interpolated", "weights": list(weights)}
    merge(experts, output=tmp_path / "out", ranking=tmp_path / "none.json", **options)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["token_indices"] == [3, 7, 9]
    made = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(outputs(made), outputs(wanted))
    assert not torch.allclose(outputs(made), outputs(base))
    merged_into(experts, tmp_path / "base", tmp_path / "into", **options)
    torch.testing.assert_close(outputs(opened(tmp_path / "into", base)), outputs(wanted))
    assert ("lm_head.weight" in load_file(tmp_path / "into" / "model.safetensors")) is not is_tied


def test_tokens_that_do_not_fit_the_rows_are_refused(tmp_path: Path) -> None:
    expert, _ = experts_of(llama(tmp_path / "base"), tmp_path)
    for tokens in ([3], [3, 3], [-1, 3], None):
        set_config(expert, token_indices=tokens)
        with pytest.raises(PimergeError, match="token_indices"):
            open_expert(expert)


def test_a_token_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    experts = experts_of(llama(tmp_path / "base"), tmp_path)
    set_config(experts[0], token_indices=[3, 5000])
    with pytest.raises(PimergeError, match="but an expert trains the row of token 5000"):
        merge(experts, output=tmp_path / "out", ranking=tmp_path / "none.json")
    assert not (tmp_path / "out").exists()


def test_experts_of_other_tokens_are_not_compared_entry_by_entry(tmp_path: Path) -> None:
    first, second = (open_expert(each) for each in experts_of(llama(tmp_path / "base"), tmp_path))
    assert differing_form(first, second) == "its token_indices is [9, 3], but [3, 7] in the target"
