"""An expert whose labels are in another order than its task's, and how embed and evaluate say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import pimerge
from pimerge.core.errors import PimergeError
from tests.support.bases import WORDS
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json

NAMES = ["neg", "pos"]
COUNT = 40


def predictions(model: torch.nn.Module, base: Path, texts: Sequence[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def write_task(folder: Path, texts: Sequence[str], classes: Sequence[int], labels: Sequence[str]) -> None:
    rows = [{"text": text, "label": NAMES[index]} for text, index in zip(texts, classes, strict=True)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "d.jsonl", "test": "d.jsonl"}
    write_json(folder / "task.json", {"type": "text-classification", "data": data, "labels": list(labels)})


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(WORDS[4 + int(i)] for i in torch.randint(len(WORDS) - 4, (3,), generator=generator))
        for _ in range(COUNT)
    ]


@pytest.fixture(scope="module")
def expert(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, texts: list[str]
) -> Path:
    """An expert that is always right, by a task that was made of its predictions with PEFT."""
    from peft import PeftModel

    folder = make_expert(tmp_path_factory.mktemp("pool") / "x", bert_base)
    model = BertForSequenceClassification.from_pretrained(bert_base, num_labels=2)
    write_task(folder, texts, predictions(PeftModel.from_pretrained(model, folder).eval(), bert_base, texts), NAMES)
    return folder


@pytest.mark.parametrize("reverse", [False, True])
def test_embed_and_evaluate_tell_the_wrong_order(expert: Path, tmp_path: Path, reverse: bool) -> None:
    folder = tmp_path / "x"
    shutil.copytree(expert, folder)
    document = json.loads((folder / "task.json").read_text())
    write_json(folder / "task.json", {**document, "labels": NAMES[::-1] if reverse else NAMES})
    said: list[str] = []
    pimerge.embed(folder, store=tmp_path / "embeddings.json", note=said.append)
    scores = pimerge.evaluate(folder, target=folder, note=said.append)
    assert scores["x"].accuracy == (0.0 if reverse else 1.0)
    order = [line for line in said if "order of labels" in line]
    assert len(order) == (2 if reverse else 0)
    for line, where in zip(order, ("its training examples", "the test split"), strict=False):
        assert f"x: accuracy 0% on {where}, and 100% if the labels were in the order neg, pos" in line


def test_the_head_of_the_base_may_have_another_order(
    tmp_path: Path, bert_base: Path, make_expert: MakeExpert, texts: list[str]
) -> None:
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = BertForSequenceClassification.from_pretrained(bert_base, **names)
    shutil.copytree(bert_base, tmp_path / "bert")
    model.save_pretrained(tmp_path / "bert")
    for name, labels in (("a", NAMES), ("b", NAMES[::-1])):
        folder = make_expert(tmp_path / name, tmp_path / "bert", head=False)
        write_task(folder, texts, [0, 1] * (COUNT // 2), labels)
    words = "the base's head answers neg, pos, in this order; the task lists pos, neg"
    with pytest.raises(PimergeError, match=words):
        pimerge.embed([tmp_path / "a", tmp_path / "b"], store=tmp_path / "embeddings.json")
    with pytest.raises(PimergeError, match=words):
        pimerge.evaluate(tmp_path / "b", target=tmp_path / "b")
