"""Classes of words, against one sentence and one word at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from sklearn.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pimerge.core.errors import PimergeError
from pimerge.tasks.intervals import bootstrap_interval
from pimerge.tasks.metric import Answers
from pimerge.tasks.sampling import sample_sentences
from pimerge.tasks.task import open_task
from pimerge.tasks.types import token_classification as words
from tests.support.bases import WORDS
from tests.support.cli import Shell
from tests.support.tasks import write_json

NAMES = ["O", "PET", "COLOUR"]
CLASSES = {"cat": "PET", "dog": "PET", "bird": "PET", "red": "COLOUR", "blue": "COLOUR"}


def write_task(folder: Path, rows: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
    """Pets and colours in sentences of one to eight words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for split in ("train", "test"):
        found = []
        for index in range(12):
            drawn = torch.randint(len(WORDS), (1 + index % 8,), generator=generator).tolist()
            tokens = [WORDS[i] for i in drawn]
            found.append({"tokens": tokens, "labels": [CLASSES.get(word, "O") for word in tokens]})
        lines = (json.dumps(row) + "\n" for row in (rows or found))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    write_json(folder / "task.json", {"type": "token-classification", "data": data, "labels": NAMES, **fields})
    return folder


Case = tuple[Any, Any, Any, list[dict[str, Any]]]


def make_case(base: Path, folder: Path, **options: Any) -> Case:
    task = open_task(folder)
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=3).eval().double()
    examples, _ = task.examples("test", words.load_processor(str(base), None), model.config, **options)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    return model, AutoTokenizer.from_pretrained(base), examples, rows


def by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """log p of the classes of each word, at its first token: (words × classes)."""
    pieces = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in row["tokens"]]
    firsts = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[token for piece in pieces for token in piece]])).logits[0]
    return logits[firsts].log_softmax(1)


@pytest.fixture(scope="module")
def case(bert_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(bert_base, write_task(tmp_path_factory.mktemp("words") / "task"))


def test_nll_is_the_sum_over_the_words(case: Case) -> None:
    model, tokenizer, examples, rows = case
    found = words.nll(model, examples.batch(range(12)))
    expected = []
    for row in rows:
        picked = by_hand(model, tokenizer, row)[range(len(row["labels"])), [NAMES.index(n) for n in row["labels"]]]
        expected.append(-float(picked.sum()))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert len(set(examples.lengths)) > 3


def test_the_score_has_the_likeliest_class_of_each_word(case: Case) -> None:
    model, tokenizer, examples, rows = case
    order = [7, 2, 9, 0]
    found = words.score(model, examples, order)
    expected = [by_hand(model, tokenizer, rows[index]).argmax(1).tolist() for index in order]
    assert found.chosen == expected
    truth = [[NAMES.index(name) for name in rows[index]["labels"]] for index in order]
    assert found.right == [a == b for a, b in zip(expected, truth, strict=True)]
    torch.testing.assert_close(found.losses, words.nll(model, examples.batch(order)))


def test_words_are_drawn_by_their_own_distributions_alone_or_together(case: Case) -> None:
    model, tokenizer, examples, rows = case
    index = max(range(12), key=lambda i: len(rows[i]["tokens"]))
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = torch.tensor(words.draw(model, examples, [index] * 2000, uniform))
    shares = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(shares, by_hand(model, tokenizer, rows[index]).exp(), atol=0.05, rtol=0)
    assert words.draw(model, examples, [index], uniform[7:8]) == [drawn[7].tolist()]
    first, second = drawn[:, 0].double(), drawn[:, 1].double()
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.07
    relabelled = examples.labelled(index, drawn[7].tolist())
    assert relabelled["labels"][relabelled["labels"] != -100].tolist() == drawn[7].tolist()


def test_the_first_piece_of_a_word_answers_and_long_sentences_are_cut(
    language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [
        {"tokens": ["catdog", "mat", "redblue"], "labels": ["PET", "O", "COLOUR"]},
        {"tokens": ["cat"] * 40, "labels": ["PET"] * 40},
    ]
    base = language_base("qwen2-lm")
    model, tokenizer, examples, _ = make_case(base, write_task(tmp_path / "task", rows))
    assert words.nll(model, examples.batch([0])).item() == pytest.approx(
        -float(by_hand(model, tokenizer, rows[0])[range(3), [1, 0, 2]].sum()), rel=1e-6
    )
    assert int((examples[0]["labels"] != -100).sum()) == 3 < len(examples[0]["labels"])
    assert examples.truncated == 1
    assert len(examples.classes[1]) == int((examples[1]["labels"] != -100).sum()) == 24


def test_metrics_are_over_words_and_their_intervals_over_sentences() -> None:
    chosen, labels = [[0, 1, 1], [2], [0, 0]], [[0, 1, 2], [2], [1, 0]]
    answers = Answers(chosen, labels, 3)
    flat, truth = ([c for row in rows for c in row] for rows in (chosen, labels))
    assert bootstrap_interval("accuracy", answers).value == pytest.approx(4 / 6)
    assert bootstrap_interval("macro-f1", answers).value == pytest.approx(f1_score(truth, flat, average="macro"))
    once = Answers([[0] * 50, [1] * 50], [[0] * 50, [0] * 50], 2)
    assert (bootstrap_interval("accuracy", once).low, bootstrap_interval("accuracy", once).high) == (0, 1)


def test_shots_are_sentences_that_hold_each_class() -> None:
    held = [{0}, {0, 1}, {0}, {0, 2}, {0, 1}, {0, 2}, {0, 1}]
    for seed in range(5):
        chosen = sample_sentences(held, 2, seed, ["a", "b", "c", "never"])
        assert all(sum(label in held[index] for index in chosen) >= 2 for label in (0, 1, 2))
        assert chosen == sorted(chosen) == sample_sentences(held, 2, seed, ["a", "b", "c", "never"])
    with pytest.raises(PimergeError, match="classes have too few sentences, 3 were asked for: 'c' \\(2\\)"):
        sample_sentences(held, 3, 0, ["a", "b", "c"])


def test_labels_may_be_numbers_of_names_in_another_order(bert_base: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", data={"train": "x.parquet", "test": "x.parquet"})
    features = Features(tokens=Sequence(Value("string")), labels=Sequence(ClassLabel(names=NAMES[::-1])))
    Dataset.from_dict({"tokens": [["the", "cat"]], "labels": [[2, 1]]}, features=features).to_parquet(
        str(folder / "x.parquet")
    )
    examples, _ = open_task(folder).examples(
        "train",
        words.load_processor(str(bert_base), None),
        AutoModelForTokenClassification.from_pretrained(bert_base).config,
    )
    assert examples.classes == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["the", "cat"], "labels": ["O"]}, r"row 1 \(from 0\) of .*there are 2 words and 1 labels"),
        ({"tokens": ["cat"], "labels": ["BIRD"]}, r"unknown labels: 'BIRD' \(1 word in rows: 1, from 0\)"),
        ({"tokens": [], "labels": []}, r"row 1 .*there are no words"),
        ({"tokens": ["the", " "], "labels": ["O", "O"]}, r"row 1 .*the word 1 \(from 0\), ' ', has no token"),
    ],
)
def test_a_row_that_does_not_fit_is_an_error(
    bert_base: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(PimergeError, match=message):
        make_case(bert_base, write_task(tmp_path / "task", [{"tokens": ["the"], "labels": ["O"]}, row]))


def test_texts_in_place_of_lists_are_an_error(bert_base: Path, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"the column 'labels' of .* holds no lists"):
        make_case(bert_base, write_task(tmp_path / "a", [{"tokens": ["the"], "labels": "O"}]))
    with pytest.raises(PimergeError, match="the tokens are 'the cat'"):
        make_case(bert_base, write_task(tmp_path / "b", [{"tokens": "the cat", "labels": ["O", "PET"]}]))


def test_the_lines_run_one_after_the_other(shell: Shell, tmp_path: Path, bert_base: Path) -> None:
    for name, labels in (("pets", NAMES), ("again", NAMES), ("other", NAMES)):
        write_task(tmp_path / "tasks" / name, labels=labels, description=name)
        scratch = f"tune --method scratch --target tasks/{name} --base {bert_base} --epochs 1 --output experts/{name}"
        result = shell(*scratch.split(), "--modules", "query,value")
        assert result.code == 0, result.err
    for line in (
        "inspect experts",
        "embed experts",
        "rank --target pets -k 1 --no-gate",
        "merge --method uniform",
        "tune --method interpolated --epochs 1 --shots 1 --output pi",
        "embed experts --labels sampled --store sampled/embeddings.json",
    ):
        result = shell(*line.split())
        assert result.code == 0, (line, result.err)
        if line.startswith("rank"):
            assert "a class per word" in result.out + result.err
    refused = shell("rank", "--target", "pets", "--measure", "logme", "--output", "x.json")
    assert refused.code == 3
    assert "a class per word" in refused.err
    scored = shell("eval", "merged", "pi", "--json")
    assert scored.code == 0, scored.err
    rows = scored.document["scores"]
    assert [row["name"] for row in rows] == ["(base)", "merged", "pi"]
    assert all(0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1 for row in rows)
