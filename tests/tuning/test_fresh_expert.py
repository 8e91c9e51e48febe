"""Where fresh experts go when nobody names layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from pimerge.checkpoints.architecture import lora_targets
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from pimerge.tuning.fresh_expert import fresh_expert
from pimerge.tuning.session import TuningSession, open_session
from tests.support.bases import IMAGE_TEXT_MODELS, LANGUAGE_MODELS, model_for, save_language_tokenizer
from tests.support.tasks import write_image_text_task, write_text_task

CPU = torch.device("cpu")
Base = Callable[[str], Path]


@pytest.mark.parametrize("name", ["vit", "clip", "bert", "gpt2", *LANGUAGE_MODELS, *IMAGE_TEXT_MODELS])
def test_a_lora_has_places_in_every_base(
    name: str,
    vit_base: Path,
    clip_base: Path,
    bert_base: Path,
    gpt2_base: Path,
    language_base: Base,
    image_text_base: Base,
) -> None:
    plain = {"vit": vit_base, "clip": clip_base, "bert": bert_base, "gpt2": gpt2_base}
    make = language_base if name in LANGUAGE_MODELS else image_text_base
    model = model_for(plain[name] if name in plain else make(name))
    found = lora_targets(model)
    assert len(found) >= 2
    for place in found:
        assert model.get_submodule(place).weight.dim() == 2
    if name in IMAGE_TEXT_MODELS:  # in the tower as in the words
        towers = [place for place in found if "vision" in place]
        assert towers
        assert len(towers) < len(found)


@pytest.mark.parametrize("name", ["llava", "paligemma", "idefics3"])
def test_bottlenecks_have_places_in_tower_and_words(
    name: str, image_text_base: Base, scans: tuple[list[Any], list[int]], tmp_path: Path
) -> None:
    task = open_task(write_image_text_task(tmp_path / "task", scans, 4))
    base = find_base(str(image_text_base(name)), None, tmp_path)
    loaded = load_base(base, task, CPU, torch.float32)
    with fresh_expert("bottleneck", TuningSession(task, base, loaded, CPU, torch.float32), size=3) as fresh:
        ends = {place.rpartition(".")[2] for place in fresh.tensor_sets}
        assert ends == {"out_proj", "fc2", "o_proj", "down_proj"}
        assert any("vision" in place for place in fresh.tensor_sets)


def odd_t5(folder: Path) -> Path:
    """A T5 whose heads have together another width than the hidden state, as the one of 11 B has."""
    special = {"vocab_size": save_language_tokenizer(folder), "pad_token_id": 0, "eos_token_id": 4}
    config = transformers.T5Config(
        d_model=16, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, **special
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_prefix_is_as_wide_as_the_keys(tmp_path: Path) -> None:
    task = open_task(write_text_task(tmp_path / "task", "t5"))
    base = find_base(str(odd_t5(tmp_path / "t5")), None, tmp_path)
    loaded = load_base(base, task, CPU, torch.float32)
    with fresh_expert("prefix", TuningSession(task, base, loaded, CPU, torch.float32), size=3) as fresh:
        assert fresh.file.entries["prompt_embeddings"].shape == (3, 2 * 2 * 4 * 6)
        model = PeftModel.from_pretrained(loaded.model, fresh.path).eval()
        examples, _ = task.examples("test", loaded.processor, loaded.config)
        with torch.no_grad():
            found = task.type.nll(model, examples.batch([0, 5]))
    assert found.isfinite().all()


def test_a_base_without_such_layers_says_what_to_do(tmp_path: Path, parity_task: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    transformers.ResNetModel(transformers.ResNetConfig(layer_type="basic", **sizes)).save_pretrained(tmp_path / "b")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "b")
    task, base = open_task(parity_task), find_base(str(tmp_path / "b"), None, tmp_path)
    session = open_session(task, base, "cpu", "float32")
    with pytest.raises(PimergeError, match="--modules"), fresh_expert("bottleneck", session):
        raise AssertionError("there is a place")
