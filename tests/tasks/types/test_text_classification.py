"""Texts and pairs of texts → tokens, against the tokenizer's own calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, T5Config

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Examples, Rows
from pimerge.tasks.schema import TaskFile
from pimerge.tasks.types import text_classification as texts

FILE = TaskFile(type="text-classification", data="rows.jsonl", labels=["a", "b"])
ROWS = {"text": ["a cat", "the dog runs fast", "bird"], "other": ["a dog", "cat", "the red bird sits on mat"]}


def encode(base: Path, rows: dict[str, list[str]], columns: dict[str, str]) -> Examples:
    processor = texts.load_processor(str(base), None)
    count = len(rows["text"])
    chosen = Rows(rows, {"label": "label", **columns}, [0] * count, range(count), "the train split")
    return texts.encode(chosen, FILE, processor, AutoConfig.from_pretrained(base))


def test_a_batch_is_what_the_tokenizer_pads(bert_base: Path) -> None:
    batch = encode(bert_base, ROWS, {"text": "text"}).batch([2, 1])
    expected = AutoTokenizer.from_pretrained(bert_base)(["bird", "the dog runs fast"], padding=True)
    assert {name: value.tolist() for name, value in batch.items() if name != "labels"} == dict(expected)


def test_pairs_of_texts_are_encoded_as_pairs(bert_base: Path) -> None:
    batch = encode(bert_base, ROWS, {"text": "text", "text_pair": "other"}).batch([0, 1, 2])
    expected = AutoTokenizer.from_pretrained(bert_base)(ROWS["text"], ROWS["other"], padding=True)
    assert batch["input_ids"].tolist() == expected["input_ids"]


@pytest.mark.parametrize("words", [23, 24, 25, 100])
def test_texts_longer_than_the_model_takes_are_cut_and_counted(bert_base: Path, words: int) -> None:
    examples = encode(bert_base, {"text": ["cat " * words, "a dog"]}, {"text": "text"})
    assert list(examples.lengths) == [min(words, 24), 2]  # the tokenizer's model_max_length is 24
    assert len(examples[0]["input_ids"]) == min(words, 24)
    assert examples.truncated == (words > 24)


def test_texts_for_a_head_that_reads_their_end_have_one_each(bert_base: Path) -> None:
    processor = texts.load_processor(str(bert_base), None)
    config = T5Config(eos_token_id=processor.convert_tokens_to_ids("fast"))
    rows = Rows({"text": ["a fast", "fast fast", "cat fast", "dog"]}, {"text": "text"}, [0] * 4, [0, 1, 5, 7], "test")
    with pytest.raises(PimergeError) as caught:
        texts.encode(rows, FILE, processor, config)
    found = [problem.message for problem in caught.value.problems]
    assert found == [
        "row 1 (from 0) of test: 2 end tokens, the others have 1",
        "row 7 (from 0) of test: 0 end tokens, the others have 1",
    ]
    with pytest.raises(PimergeError, match="adds no end token"):
        texts.encode(rows, FILE, processor, T5Config(eos_token_id=99))


def test_a_tokenizer_without_padding_pads_with_its_end(gpt2_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_base)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    assert texts.load_processor(str(tmp_path), None).pad_token == "[SEP]"
