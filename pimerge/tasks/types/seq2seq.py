"""Answers in text by an encoder and a decoder (T5, BART; ``prompt``, and ``answer`` or ``labels``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types import _encoding as encoding
from pimerge.tasks.types._generation import draw, read, score
from pimerge.tasks.types._likelihood import nll
from pimerge.tasks.types._templates import check_texts
from pimerge.tasks.types._text_examples import Prompts, TextRows, Writing
from pimerge.tasks.types._tokenizer import load_processor, longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every row once; a prompt that is too long for the encoder is cut at its end."""
    return encode_texts(encoding.in_words(rows, file), processor, config)


def encode_texts(worded: TextRows, processor: Any, config: PreTrainedConfig) -> Examples:
    """Encode rows that are already texts."""
    asked = [text.prompt for text in worded.texts]
    whole = processor(asked, truncation=False, verbose=False)["input_ids"]
    fitting = processor(asked, truncation=True, max_length=longest_input(processor, config))["input_ids"]
    return encode_prompts(worded, Prompts(whole, lambda place, room: fitting[place]), processor, config)


def encode_prompts(worded: TextRows, prompts: Prompts, tokenizer: Any, config: PreTrainedConfig) -> Examples:
    """Encode the answers to prompts that are already tokens."""
    import torch

    end, longest = encoding.end_token(tokenizer, config), longest_input(tokenizer, config)
    start = _start_token(config)
    answers = [
        [_ended(ids, end) for ids in tokenizer(text_target=list(text.answers), verbose=False)["input_ids"]]
        for text in worded.texts
    ]
    tokens, truncated = encoding.fit(worded, prompts, answers, longest, lambda answer: longest)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def source(index: int) -> Batch:
        ids = tokens[index].prompt
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            **prompts.beside(index, ids, 0),
        }

    def answered(index: int, candidate: int) -> Batch:
        return {**source(index), **_target(start, tokens[index].answers[candidate])}

    writing = None
    if not worded.by_likelihood:

        def to_answer(indices: Sequence[int]) -> Batch:
            return encoding.collate([source(index) for index in indices], pad)

        most = encoding.new_tokens(worded.file, longest - 1, answers)
        writing = Writing(to_answer, encoding.decoding(tokenizer, answers), start, (end,), pad, most)
    return encoding.examples_of(worded, prompts, tokens, truncated, answered=answered, pad=pad, writing=writing)


def _target(start: int, answer: list[int]) -> Batch:
    """Make the decoder's inputs: it reads the answer after its start token, and predicts one token ahead."""
    import torch

    labels = torch.tensor(answer)
    return {
        "decoder_input_ids": torch.tensor([start, *answer[:-1]]),
        "decoder_attention_mask": torch.ones_like(labels),
        "labels": labels,
    }


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]


def _start_token(config: PreTrainedConfig) -> int:
    """The decoder's first token; T5 uses the padding token."""
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(config, "pad_token_id", None)
    if start is None:
        raise PimergeError(
            "the base's config has no decoder_start_token_id, from which its decoder starts", "set it in config.json"
        )
    return int(start)


TASK_TYPE = TaskType(
    name="seq2seq",
    summary="Answers in text by a model with an encoder and a decoder (T5, BART).",
    auto_model="AutoModelForSeq2SeqLM",
    peft_task="SEQ_2_SEQ_LM",
    trains_head=False,
    columns=encoding.COLUMNS,
    fields=encoding.FIELDS,
    answers=("texts",),
    check=check_texts,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
