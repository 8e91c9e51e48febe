"""Heads of a base, against those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.models.heads import head_of_size, initialise_head, set_head
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from tests.support.bases import model_for, save_tokenizer
from tests.support.experts import MakeExpert
from tests.support.loading import CPU, load, pixels, require_same, state_of
from tests.support.numerics import logits_of


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_head_of_another_size_answers_zero_until_it_is_set_and_is_then_removed(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_base")
    if kind == "bert":  # without a pooler, which belongs to the head then
        folder = tmp_path / "bert"
        transformers.BertModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        base = folder
    task: Path = request.getfixturevalue("parity_task" if kind == "vit" else "text_task")
    loaded = load(base, task)
    before = state_of(loaded)
    batch = pixels() if kind == "vit" else {"input_ids": torch.arange(4, 16).reshape(3, 4)}
    expected = logits_of(loaded.model, batch)
    for labels in (5, 1):
        with head_of_size(loaded, find_base(str(base), None, base), open_task(task), labels):
            assert logits_of(loaded.model, batch).tolist() == [[0] * labels] * 3
            set_head(loaded.model, {"classifier.bias": torch.arange(float(labels))})
            assert logits_of(loaded.model, batch).tolist() == [list(range(labels))] * 3
        require_same(loaded, before)
    with pytest.raises(KeyboardInterrupt), head_of_size(loaded, find_base(str(base), None, base), open_task(task), 5):
        raise KeyboardInterrupt
    require_same(loaded, before)
    assert torch.equal(logits_of(loaded.model, batch), expected)


@pytest.mark.parametrize("plain", [True, False])
def test_a_head_is_copied_into_a_model_plain_or_pefts(
    vit_base: Path, make_expert: MakeExpert, tmp_path: Path, plain: bool
) -> None:
    model = model_for(vit_base)
    if not plain:
        model = PeftModel.from_pretrained(model, make_expert(tmp_path / "a", vit_base))
    head = {"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.tensor([1.0, -1.0])}
    set_head(model, head)
    assert logits_of(model.eval(), pixels()).tolist() == [[1, -1]] * 3


def test_a_head_that_does_not_fit_names_every_tensor(vit_base: Path) -> None:
    with pytest.raises(PimergeError) as caught:
        set_head(model_for(vit_base), {"classifier.weight": torch.zeros(3, 16), "score.weight": torch.zeros(1)})
    assert "no 'score.weight'" in str(caught.value)
    assert "'classifier.weight' is (3, 16), the model's (2, 16)" in str(caught.value)


@pytest.mark.parametrize("base", ["vit", "clip", "bert", "roberta", "t5", "gpt2", "own"])
def test_a_head_initialised_again_is_that_of_a_base_loaded_with_this_seed(
    request: pytest.FixtureRequest, parity_task: Path, text_task: Path, tmp_path: Path, base: str
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if base in ("roberta", "t5", "own"):
        config: Any = transformers.RobertaConfig(vocab_size=30, max_position_embeddings=32, **sizes)
        if base == "t5":
            config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        config.id2label = {0: "dog", 1: "cat"}
        kind: Any = transformers.AutoModelForSequenceClassification if base == "own" else transformers.AutoModel
        kind.from_config(config).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
    folder = tmp_path if base in ("roberta", "t5", "own") else request.getfixturevalue(f"{base}_base")
    task = open_task(parity_task if base in ("vit", "clip") else text_task)
    found = find_base(str(folder), None, folder)
    first, expected = (load_base(found, task, CPU, torch.float32, seed) for seed in (0, 7))
    for tensor in first.head_parameters():
        if base != "own":
            tensor.data.fill_(5.0)
    initialise_head(first, 7)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], value), name
    assert bool(first.randomly_initialised) != (base == "own")
