"""Adapters whose vocabularies have other sizes, against PEFT's models of each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.merging.merge import merge
from tests.support.into_cases import adapted, llama, opened, outputs

SIZES = {"a": None, "b": 68, "c": 66}
BOTH = ["embed_tokens", "lm_head"]
LAYERS = ("model.embed_tokens.weight", "lm_head.weight")
CASES = {
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=BOTH),
    "updated": LoraConfig(r=2, target_modules=["q_proj", *BOTH]),
}


def experts_of(folder: Path, config: LoraConfig, tied: bool = False) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """A base, and adapters of it with vocabularies of 64, 68 and 66 tokens; the state of PEFT's model of each."""
    base = llama(folder / "base", tie_word_embeddings=tied)
    states = {}
    for seed, (name, rows) in enumerate(SIZES.items()):
        grown = copy.deepcopy(base)
        if rows is not None:
            torch.manual_seed(seed)
            grown.resize_token_embeddings(rows)
        model = adapted(grown, copy.deepcopy(config), folder / name, folder / "base", seed=seed)
        states[name] = model.merge_and_unload().state_dict()
    return base, states


def summed(base: Any, states: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> dict[str, Tensor]:
    """W0 + Σ w_n (W_n − W0); tokens beyond the base's have the mean of those that have them."""
    found = {}
    for key, start in base.state_dict().items():
        own = {name: states[name][key].double() for name in weights}
        rows = min(len(value) for value in own.values())
        total = start.double() + sum(w * (own[name][:rows] - start) for name, w in weights.items())
        for row in range(rows, max(len(value) for value in own.values())):
            holders = {name: value[row] for name, value in own.items() if row < len(value)}
            share = sum(weights[name] for name in holders)
            total = torch.cat([total, sum(weights[name] / share * value for name, value in holders.items())[None]])
        found[key] = total.float()
    return found


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"b": 0.5, "a": 1.0}, {"a": 0.2, "b": 0.3, "c": 0.5}])
@pytest.mark.parametrize("name", CASES)
def test_common_tokens_are_merged_and_the_others_copied(name: str, weights: dict[str, float], tmp_path: Path) -> None:
    base, states = experts_of(tmp_path, CASES[name])
    state = summed(base, states, weights)
    wanted = copy.deepcopy(base)
    wanted.resize_token_embeddings(68, mean_resizing=False)
    wanted.load_state_dict(state)
    options = {"method": "interpolated", "weights": [*weights.values()], "ranking": tmp_path / "none.json"}
    merged = merge([tmp_path / each for each in weights], output=tmp_path / "out", **options)
    assert [sentence for sentence in merged.plan["handled"] if "68 tokens: their common rows are merged" in sentence]
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(68)
    found = PeftModel.from_pretrained(grown, tmp_path / "out")
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-5, atol=1e-5)
    for key, value in found.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-5)
    merge([tmp_path / each for each in weights], into=tmp_path / "base", output=tmp_path / "full", **options)
    full = opened(tmp_path / "full", base)
    assert full.config.vocab_size == 68
    torch.testing.assert_close(outputs(full), outputs(wanted), rtol=1e-5, atol=1e-5)


def test_a_vocabulary_that_grew_beside_an_expert_without_embeddings(tmp_path: Path) -> None:
    base, states = experts_of(tmp_path, CASES["updated"])
    model = adapted(base, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "plain", tmp_path / "base", seed=7)
    states["plain"] = model.merge_and_unload().state_dict()
    wanted = summed(base, states, {"plain": 0.5, "b": 0.5})
    merge([tmp_path / "plain", tmp_path / "b"], output=tmp_path / "out", ranking=tmp_path / "none.json")
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(68)
    found = PeftModel.from_pretrained(grown, tmp_path / "out").merge_and_unload().state_dict()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "tsv", "slerp"])
def test_every_method_works_on_the_common_tokens(method: str, tmp_path: Path) -> None:
    base, _ = experts_of(tmp_path, CASES["updated"])
    two = [tmp_path / "a", tmp_path / "b"]
    options = {"method": method, "ranking": tmp_path / "none.json", "space": "delta" if method == "ties" else "core"}
    merge(two, output=tmp_path / "out", verify=True, **options)
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(68)
    found = PeftModel.from_pretrained(copy.deepcopy(grown), tmp_path / "out")
    own = PeftModel.from_pretrained(copy.deepcopy(grown), tmp_path / "b")
    for layer in (found.get_submodule(f"base_model.model.{key.removesuffix('.weight')}") for key in LAYERS):
        name = next(name for name, module in found.named_modules() if module is layer)
        delta, expected = (m.get_submodule(name).get_delta_weight("default") for m in (found, own))
        torch.testing.assert_close(delta[64:], expected[64:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(delta[:64], expected[:64], atol=1e-3)


def tokenizer(folder: Path, tokens: list[str]) -> None:
    document = {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}}
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", CASES)
def test_tokenizers_that_disagree_are_refused(name: str, tmp_path: Path) -> None:
    experts_of(tmp_path, CASES[name])
    tokens = [f"t{number}" for number in range(68)]
    tokenizer(tmp_path / "b", tokens)
    tokenizer(tmp_path / "c", tokens[:66])
    two, none = [tmp_path / "b", tmp_path / "c"], tmp_path / "none.json"
    merge(two, output=tmp_path / "out", ranking=none)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert len(written["model"]["vocab"]) == 68
    assert "tokenizer.json" in json.loads((tmp_path / "out" / "pimerge.json").read_text())["outputs"]
    tokenizer(tmp_path / "c", [*tokens[:65], "<image>"])
    with pytest.raises(PimergeError, match="token 65 is 't65' in 'b' and '<image>' in 'c'"):
        merge(two, output=tmp_path / "other", ranking=none)
    assert not (tmp_path / "other").exists()
