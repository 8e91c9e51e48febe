"""Choices against the likelihood of each, asked for one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.evaluation.scoring import score_experts
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from tests.support.bases import END, model_for
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json
from tests.support.tuning import tune

Base = Callable[[str], Path]
ROWS: list[dict[str, Any]] = [
    {"question": "the cat sits", "choices": ["on mat", "under the red tree"], "answer": 1},
    {"question": "the dog", "choices": ["runs fast", "flies", "sits on the mat", "red"], "answer": 0},
    {"question": "a bird", "choices": ["flies", "runs and runs and runs"], "answer": 0},
]
KEYED = [
    {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": list("ABCD")[: len(row["choices"])]},
        "answer": "ABCD"[row["answer"]],
    }
    for row in ROWS
]


def write_task(folder: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "rows.jsonl", "test": "rows.jsonl"}
    write_json(folder / "task.json", {"type": "multiple-choice", "data": data, **fields})
    return folder


def by_hand(base: Path, model: Any, tokenizer: Any, row: dict[str, Any]) -> list[list[float]]:
    """log p of each token of each choice and its end."""
    prompt = f"Question: {row['question']}\nAnswer:"
    found = []
    for choice in row["choices"]:
        with torch.no_grad():
            if base.name == "t5":
                tokens = [*tokenizer(choice)["input_ids"], END]
                decoder = torch.tensor([[0, *tokens[:-1]]])
                source = torch.tensor([tokenizer(prompt)["input_ids"][:24]])
                logits = model(input_ids=source, decoder_input_ids=decoder).logits[0]
            else:
                tokens = [*tokenizer(" " + choice)["input_ids"], END]
                longest = max(len(tokenizer(" " + other)["input_ids"]) + 1 for other in row["choices"])
                source = tokenizer(prompt)["input_ids"][-(24 - longest) :]
                logits = model(input_ids=torch.tensor([source + tokens])).logits[0, len(source) - 1 :]
        found.append([float(logits[place].log_softmax(0)[token]) for place, token in enumerate(tokens)])
    return found


@pytest.mark.parametrize("name", ["t5", "llama-lm"])
@pytest.mark.parametrize("normalise", ["sum", "tokens"])
@pytest.mark.parametrize("rows", [ROWS, KEYED])
def test_the_likeliest_choice_is_the_answer(
    language_base: Base, tmp_path: Path, name: str, normalise: str, rows: list[dict[str, Any]]
) -> None:
    base, task = language_base(name), open_task(write_task(tmp_path / "task", rows, normalise=normalise))
    loaded = load_base(find_base(str(base), None, base), task, torch.device("cpu"), torch.float64)
    examples, labels = task.examples("test", loaded.processor, loaded.config)
    found = task.type.score(loaded.model, examples, [2, 0, 1])
    tokens = [by_hand(base, model_for(base).double(), loaded.processor, ROWS[index]) for index in (2, 0, 1)]
    value = sum if normalise == "sum" else lambda choice: sum(choice) / len(choice)
    expected = [max(range(len(row)), key=lambda choice: value(row[choice])) for row in tokens]
    right = [ROWS[index]["answer"] for index in (2, 0, 1)]
    assert found.chosen == expected
    assert found.right == [choice == answer for choice, answer in zip(expected, right, strict=True)]
    losses = [-sum(row[answer]) for row, answer in zip(tokens, right, strict=True)]
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-9)
    assert task.type.nll(loaded.model, examples.batch([2, 0, 1])).tolist() == pytest.approx(losses, rel=1e-9)
    assert labels == [0, 0, 0]
    assert all(0 <= c < len(ROWS[1]["choices"]) for c in task.type.draw(loaded.model, examples, [1] * 9, torch.rand(9)))


def test_a_template_lists_choices_that_lie_in_several_columns(language_base: Base, tmp_path: Path) -> None:
    base = language_base("t5")
    rows = [
        {
            "question": row["question"],
            "right": row["choices"][row["answer"]],
            "wrong": row["choices"][1 - row["answer"]],
        }
        for row in ROWS
    ]
    spread = open_task(
        write_task(tmp_path / "spread", rows, choices="{{ [wrong, right] }}", columns={"answer": "right"})
    )
    whole = [
        {"question": row["question"], "choices": [row["wrong"], row["right"]], "answer": row["right"]} for row in rows
    ]
    listed = open_task(write_task(tmp_path / "listed", whole))
    found, expected = (
        task.examples("train", task.type.load_processor(str(base), None), model_for(base).config)[0]
        for task in (spread, listed)
    )
    assert found.texts == expected.texts
    assert [text.right for text in found.texts] == [1, 1, 1]


@pytest.mark.parametrize(("name", "peft_task"), [("bart", "SEQ_2_SEQ_LM"), ("gpt2-lm", "CAUSAL_LM")])
def test_it_tunes_and_scores_either_kind_of_base(
    language_base: Base, make_expert: MakeExpert, tmp_path: Path, name: str, peft_task: str
) -> None:
    folder = language_base(name)
    task, base = open_task(write_task(tmp_path / "task")), find_base(str(folder), None, folder)
    expert = open_expert(make_expert(tmp_path / "x", folder))
    options = TrainingOptions(epochs=1, holdout=0)
    tune("interpolated", task, base, [expert], expert, tmp_path / "out", options, device="cpu")
    tuned = open_expert(tmp_path / "out")
    assert tuned.config["task_type"] == peft_task
    bare, own = score_experts([tuned], task, base, None, device="cpu")
    assert (list(bare.metrics), list(own.metrics)) == (["accuracy"], ["accuracy"])
    assert own.loss != bare.loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 7}, "row 1 .*the answer is 7\n  → expected one of 0, 1, 2, 3"),
        ({"answer": -1}, "row 1 .*the answer is -1"),
        ({"choices": ["only"]}, "row 1 .*the choices are"),
        ({"choices": ["a", " "]}, "row 1 .*a choice is empty"),
    ],
)
def test_a_row_that_is_no_question_is_told(
    language_base: Base, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [row | (change if index == 1 else {}) for index, row in enumerate(ROWS)]
    task, base = open_task(write_task(tmp_path / "task", rows)), language_base("t5")
    with pytest.raises(PimergeError, match=message):
        task.examples("train", task.type.load_processor(str(base), None), model_for(base).config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["a", "b"]}, "each row has its own choices"),
        ({"prompt": "{{"}, "prompt: line 1"),
        ({"choices": "{{"}, "choices: line 1"),
        ({"choices": "{{ [a] }}", "columns": {"choices": "b"}}, "both choices and columns define"),
        ({"metrics": ["macro-f1"]}, "'macro-f1' is about classes"),
        ({"normalise": "characters"}, "normalise"),
        ({"scoring": "generation"}, "the type 'multiple-choice' has no field 'scoring'"),
    ],
)
def test_a_task_file_that_does_not_fit_is_told(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PimergeError, match=message):
        open_task(write_task(tmp_path / "task", **fields))
