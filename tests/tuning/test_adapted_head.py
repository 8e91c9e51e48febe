"""Experts that adapt modules on top of the backbone: a pooler, or the base's own head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.evaluation.scoring import score_experts
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TuneResult
from pimerge.tuning.tune import tune
from tests.support.bases import WORDS, save_tokenizer
from tests.support.peft_outputs import adapter_of, open_strictly

BRIEF = TrainingOptions(epochs=1, shots=4)


@pytest.fixture(scope="module")
def pooled_base(tmp_path_factory: pytest.TempPathFactory, text_task: Path) -> Path:
    """A DeBERTa whose pooler and classifier for the task are on top of the backbone."""
    folder, labels = tmp_path_factory.mktemp("bases") / "deberta", open_task(text_task).labels
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = transformers.DebertaV2Config(**sizes, vocab_size=len(WORDS) + 4, max_position_embeddings=32, **names)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def model_of(base: Path) -> torch.nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(base)  # type: ignore[no-any-return]


def experts_of(base: Path, folder: Path, *targets: str, task_type: str | None = "SEQ_CLS") -> list[Path]:
    config = LoraConfig(r=2, target_modules=["query_proj", *targets], task_type=task_type)
    for seed, name in enumerate("ab"):
        adapter_of(model_of(base), config, folder / name, seed)
    return [folder / "a", folder / "b"]


def brief(experts: list[Path], task: Path, folder: Path, method: str = "learned", **more: Any) -> TuneResult:
    where = {"ranking": folder / "none", "output": folder / "tuned"}
    return tune(experts, method=method, target=task, options=BRIEF, **where, **more)


@pytest.mark.parametrize("method", ["learned", "soup", "ensemble"])
def test_a_pooler_is_mixed_and_the_classifier_trained(
    method: str, pooled_base: Path, text_task: Path, tmp_path: Path
) -> None:
    experts = experts_of(pooled_base, tmp_path, "pooler.dense")
    result = brief(experts, text_task, tmp_path, method=method)
    if method == "ensemble":
        assert score_experts([], open_task(text_task), open_expert(experts[0]).base, None)
        return
    tuned = open_expert(result.output)
    assert "pooler.dense" in tuned.modules
    assert tuned.head.keys() == {"classifier.weight", "classifier.bias"}
    open_strictly(model_of(pooled_base), result.output)


def test_a_head_that_the_experts_adapt_is_the_bases_own(pooled_base: Path, text_task: Path, tmp_path: Path) -> None:
    experts = experts_of(pooled_base, tmp_path, "pooler.dense", "classifier", task_type=None)
    result = brief(experts, text_task, tmp_path)
    tuned = open_expert(result.output)
    assert "classifier" in tuned.modules
    assert not tuned.head
    assert json.loads((result.output / "adapter_config.json").read_text())["task_type"] is None
    open_strictly(model_of(pooled_base), result.output)
    assert score_experts([tuned], open_task(text_task), tuned.base, None)[1].note == "the base's own head"


def test_a_layer_inside_a_classifier_is_mixed_and_the_rest_trained(text_task: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    labels = open_task(text_task).labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = transformers.RobertaConfig(**sizes, vocab_size=len(WORDS) + 4, max_position_embeddings=40, **names)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["query", "classifier.dense"], modules_to_save=["out_proj"])
    for seed, name in enumerate("ab"):
        adapter_of(model_of(tmp_path / "base"), lora, tmp_path / name, seed)
    result = brief([tmp_path / "a", tmp_path / "b"], text_task, tmp_path)
    tuned = open_expert(result.output)
    assert "classifier.dense" in tuned.modules
    assert tuned.head.keys() == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    open_strictly(model_of(tmp_path / "base"), result.output)  # PEFT would replace the whole head of SEQ_CLS
    assert score_experts([tuned], open_task(text_task), tuned.base, None)[1].accuracy is not None


def test_a_head_that_the_base_does_not_have_cannot_be_adapted(
    pooled_base: Path, text_task: Path, tmp_path: Path
) -> None:
    transformers.DebertaV2Model.from_pretrained(pooled_base).save_pretrained(tmp_path / "bare")
    save_tokenizer(tmp_path / "bare")
    experts = experts_of(pooled_base, tmp_path, "pooler.dense")
    with pytest.raises(PimergeError, match=r"'a' adapts 'pooler\.dense', a part of the head for which the base has no"):
        brief(experts, text_task, tmp_path, base=tmp_path / "bare")
    assert not (tmp_path / "tuned").exists()
