"""``pimerge.extract`` where layers share a weight, or one tensor holds the weights of several layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

import pimerge
from tests.support.into_cases import SIZES, filled, llama, opened, outputs


def shaken(model: Any, folder: Path) -> Any:
    """A fine-tune of all matrices of a model."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    found.save_pretrained(folder)
    return found


def test_tied_layers_have_factors_each_and_the_note_says_how_to_merge(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    tuned, notes = shaken(base, tmp_path / "tuned"), list[str]()
    pimerge.extract(tmp_path / "tuned", base=tmp_path / "base", rank="max", output=tmp_path / "x", note=notes.append)
    assert any("model.embed_tokens and lm_head share one weight" in note for note in notes)
    beside = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "x")
    torch.testing.assert_close(outputs(beside), outputs(tuned), rtol=1e-4, atol=1e-4)
    pimerge.merge(tmp_path / "x", into=tmp_path / "base", output=tmp_path / "full", ranking=tmp_path / "none")
    torch.testing.assert_close(outputs(opened(tmp_path / "full", base)), outputs(tuned), rtol=1e-4, atol=1e-4)
    notes.clear()
    pimerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", exclude=["lm_head"], output=tmp_path / "y", note=notes.append
    )
    assert not notes


def test_stacked_weights_of_a_mixture_are_left_out_by_name(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, head_dim=4
    )
    base = filled(transformers.GptOssForCausalLM(config))
    base.save_pretrained(tmp_path / "base")
    shaken(base, tmp_path / "tuned")
    found = pimerge.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "x")
    why = {each.name: each.why for each in found.left_out}
    assert "stacked weights of a mixture's experts" in why["model.layers.0.mlp.experts.gate_up_proj"]
