"""Answers in text by an encoder and a decoder (T5, BART; ``prompt``, and ``answer`` or ``labels``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pimerge.errors import PimergeError
from pimerge.task_types import Batch, Examples, Rows
from pimerge.task_types import _generation as generation
from pimerge.task_types._generation import COLUMNS, FIELDS, TRAINS_HEAD, draw, nll, read, score
from pimerge.task_types._templates import Text, check_texts, fill_in
from pimerge.task_types._tokenizer import load_processor, longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.task_file import TaskFile

__all__ = [
    "AUTO_MODEL",
    "COLUMNS",
    "FIELDS",
    "PEFT_TASK",
    "TRAINS_HEAD",
    "check",
    "draw",
    "encode",
    "load_processor",
    "nll",
    "read",
    "score",
]

AUTO_MODEL = "AutoModelForSeq2SeqLM"
PEFT_TASK = "SEQ_2_SEQ_LM"
check = check_texts


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every row once; a prompt that the encoder does not take whole loses its end."""
    return encode_texts(
        rows, fill_in(rows, file), file, processor, config, by_likelihood=generation.by_likelihood(file)
    )


def encode_texts(
    rows: Rows,
    texts: Sequence[Text],
    file: TaskFile,
    processor: Any,
    config: PreTrainedConfig,
    *,
    by_likelihood: bool,
) -> Examples:
    """Encode rows that are in words already; ``by_likelihood`` if the likeliest candidate is the answer."""
    end, longest = generation.end_token(processor, config), longest_input(processor, config)
    start = _start_token(config)
    asked = [text.prompt for text in texts]
    whole = processor(asked, truncation=False, verbose=False)["input_ids"]
    fitting = processor(asked, truncation=True, max_length=longest)["input_ids"]
    answers = [
        [_ended(ids, end) for ids in processor(text_target=list(text.answers), verbose=False)["input_ids"]]
        for text in texts
    ]
    tokens, truncated = generation.fit(rows, whole, answers, texts, longest, lambda place, answer: fitting[place])
    pad = processor.pad_token_id if processor.pad_token_id is not None else end
    writing = None
    if not by_likelihood:

        def to_answer(indices: Sequence[int]) -> Batch:
            ids = [torch.tensor(tokens[i].prompt) for i in indices]
            return {
                "input_ids": pad_sequence(ids, True, pad),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
            }

        def decode(ids: list[int]) -> str:
            return str(processor.decode(ids, skip_special_tokens=True))

        most = generation.new_tokens(file, longest - 1, answers)
        writing = generation.Writing(to_answer, decode, start, (end,), pad, most)
    return generation.examples_of(
        rows, texts, tokens, partial(_item, start), pad, truncated, writing, file.normalise == "tokens"
    )


def _item(start: int, prompt: list[int], answer: list[int]) -> Batch:
    """The decoder reads the answer behind its start token, and foretells it one token ahead."""
    source, labels = torch.tensor(prompt), torch.tensor(answer)
    return {
        "input_ids": source,
        "attention_mask": torch.ones_like(source),
        "decoder_input_ids": torch.tensor([start, *answer[:-1]]),
        "decoder_attention_mask": torch.ones_like(labels),
        "labels": labels,
    }


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]


def _start_token(config: PreTrainedConfig) -> int:
    """What the decoder starts from; T5 takes the padding.

    Raises:
        PimergeError: if the config names neither.
    """
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(config, "pad_token_id", None)
    if start is None:
        raise PimergeError(
            "the base's config has no decoder_start_token_id, from which its decoder starts", "set it in config.json"
        )
    return int(start)
