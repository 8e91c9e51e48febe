"""Likelihoods of many answers to one prompt, against those of one answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from pimerge.tasks.task import open_task
from pimerge.tasks.types import _likelihood
from pimerge.tasks.types._likelihood import begins_behind_prompts, likelihoods, nll
from tests.support.bases import IMAGE_TEXT_MODELS, LANGUAGE_MODELS, WORDS, model_for, save_language_tokenizer
from tests.support.experts import peft_config
from tests.support.tasks import write_image_text_task, write_text_task

Base = Callable[[str], Path]
Scans = tuple[list[Any], list[int]]
TEN = [" ".join(WORDS[place : place + 1 + place % 3]) for place in range(10)]
SMALL = {
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def examples_of(task: Path, base: Path, model: nn.Module) -> Any:
    opened = open_task(task)
    return opened.examples("test", opened.type.load_processor(str(base), None), model.config)[0]


def one_at_a_time(model: nn.Module, examples: Any, indices: list[int]) -> torch.Tensor:
    """log p of each candidate by a batch of its own."""
    most = max(len(examples.tokens[index].answers) for index in indices)
    found = torch.full((len(indices), most), -torch.inf, dtype=torch.float64)
    for place, index in enumerate(indices):
        for candidate in range(len(examples.tokens[index].answers)):
            with torch.no_grad():
                found[place, candidate] = -nll(model, examples.collate([examples.labelled(index, candidate)]))[0]
    return found


def count_tokens(module: nn.Module) -> list[int]:
    """The tokens of each pass through a module of the form (batch × tokens × …)."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_ten_labels_of_a_text(language_base: Base, name: str, tmp_path: Path) -> None:
    base = language_base(name)
    model = model_for(base).double()
    examples = examples_of(write_text_task(tmp_path / "task", name, labels=TEN), base, model)
    indices = [5, 0, 7, 4, 11]
    expected = one_at_a_time(model, examples, indices)
    torch.testing.assert_close(likelihoods(model, examples, indices), expected, rtol=1e-9, atol=1e-9)
    layers = ("encoder.block.0", "encoder.layers.0", "model.layers.0", "transformer.h.0")
    seen = count_tokens(next(part for path, part in model.named_modules() if path.endswith(layers)))
    likelihoods(model, examples, indices)
    prompt = max(len(examples.tokens[index].prompt) for index in indices)
    assert seen[0] == prompt
    assert max(seen[1:], default=0) < prompt


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
@pytest.mark.parametrize("shows", [True, False])
def test_ten_labels_of_an_image(image_text_base: Base, name: str, shows: bool, scans: Scans, tmp_path: Path) -> None:
    base = image_text_base(name)
    model = model_for(base).double()
    columns = {"image": "scan", "label": "parity"} if shows else {"label": "parity"}
    examples = examples_of(write_image_text_task(tmp_path / "task", scans, columns=columns, labels=TEN), base, model)
    indices = [5, 0, 7, 4, 11]
    expected = one_at_a_time(model, examples, indices)
    towers: list[object] = []
    pixels = next(part for part in model.get_encoder("image").modules() if isinstance(part, nn.Conv2d))
    pixels.register_forward_pre_hook(lambda *seen: towers.append(seen))
    torch.testing.assert_close(likelihoods(model, examples, indices), expected, rtol=1e-7, atol=1e-7)
    assert len(towers) == shows
    assert "forward" not in vars(model.get_encoder("image"))


def test_choices_differ_in_number(language_base: Base, tmp_path: Path) -> None:
    for name in ("t5", "llama-lm"):
        base = language_base(name)
        model = model_for(base).double()
        fields = {"labels": None, "prompt": None, "columns": {"question": "words", "answer": "animal"}}
        choices = "{{ ['the cat', 'a', 'dog sits', 'bird'][:2 + words | length % 3] }}"
        task = write_text_task(tmp_path / name, name, type="multiple-choice", choices=choices, **fields)
        examples = examples_of(task, base, model)
        counts = {len(row.answers) for row in examples.tokens}
        assert len(counts) > 1
        expected = one_at_a_time(model, examples, list(range(12)))
        found = likelihoods(model, examples, list(range(12)))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "ia3"])
@pytest.mark.parametrize("name", ["t5", "llama-lm"])
def test_vectors_before_the_text(language_base: Base, kind: str, name: str, tmp_path: Path) -> None:
    base = language_base(name)
    torch.manual_seed(0)
    model = get_peft_model(model_for(base), peft_config(kind, name)).double().eval()
    examples = examples_of(write_text_task(tmp_path / "task", name, labels=TEN), base, model)
    assert begins_behind_prompts(model, examples) == (name == "llama-lm" and kind == "ia3")
    same = [index for index, row in enumerate(examples.tokens) if len(row.prompt) == len(examples.tokens[1].prompt)]
    expected = one_at_a_time(model, examples, same)
    torch.testing.assert_close(likelihoods(model, examples, same), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "fields", "apart"),
    [
        ("Mistral", {"sliding_window": 3}, True),
        ("Gemma3Text", {"sliding_window": 3, "head_dim": 8, "num_hidden_layers": 6}, True),
        ("Mamba", {}, False),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, True),
        ("Bloom", {}, False),
        ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 32}, False),
        ("GPTNeoX", {}, True),
    ],
)
def test_other_kinds_of_memory_and_position(name: str, fields: dict[str, Any], apart: bool, tmp_path: Path) -> None:
    size = save_language_tokenizer(tmp_path / "base")
    sizes = {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 4, "bos_token_id": 2, **SMALL, **fields}
    config = getattr(transformers, f"{name}Config")(max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    examples = examples_of(write_text_task(tmp_path / "task", name, labels=TEN), tmp_path / "base", model)
    assert begins_behind_prompts(model, examples) == apart
    expected = one_at_a_time(model, examples, [5, 0, 7])
    torch.testing.assert_close(likelihoods(model, examples, [5, 0, 7]), expected, rtol=1e-9, atol=1e-9)


def test_a_model_comes_back_as_it_was() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.T5Config(is_encoder_decoder=True)
            self.encoder = nn.Identity()
            self.encoder.forward = own  # as accelerate does

        def get_encoder(self, modality: str | None = None) -> nn.Module:
            return self if modality else self.encoder

    calls = []

    def own(value: int) -> int:
        calls.append(value)
        return value

    model = Hooked()
    with _likelihood._read_once(model):
        assert [model.encoder(1), model.encoder(1)] == [1, 1]
        assert calls == [1]
    assert model.encoder.forward is own
