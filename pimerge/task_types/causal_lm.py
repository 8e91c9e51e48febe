"""Answers in text by a model that continues its prompt (Llama, Qwen, GPT-2; ``prompt``, ``answer`` or ``labels``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pimerge.errors import PimergeError
from pimerge.task_types import IGNORED, Batch, Examples, Rows
from pimerge.task_types import _generation as generation
from pimerge.task_types._generation import COLUMNS, TRAINS_HEAD, draw, nll, read, score
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

AUTO_MODEL = "AutoModelForCausalLM"
PEFT_TASK = "CAUSAL_LM"
FIELDS = generation.FIELDS | {"chat"}
check = check_texts


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every row once; where prompt and answer are too long together, the prompt loses its beginning."""
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
    if file.chat:
        _require_chat_template(processor)
        end = _end_of_turn(processor, end)
        prompts = [_plain(processor, _turn(processor, text.prompt)) for text in texts]
        answers = [[[*_plain(processor, answer), end] for answer in text.answers] for text in texts]
    else:
        prompts = _running(processor, [text.prompt for text in texts], end)
        answers = [
            [[*ids, end] for ids in _continuations(processor, text, prompt, end)]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
    begin = processor.bos_token_id
    tokens, truncated = generation.fit(
        rows,
        prompts,
        answers,
        texts,
        longest - 1,  # of the prompt, one token at least
        lambda place, answer: _cut_front(prompts[place], longest - answer, begin),
    )
    pad = processor.pad_token_id if processor.pad_token_id is not None else end
    writing = None
    if not by_likelihood:
        most = generation.new_tokens(file, longest - 1, answers)

        def to_continue(indices: Sequence[int]) -> Batch:
            # padded on the left, so that every answer follows its prompt
            ids = [torch.tensor(_cut_front(tokens[i].prompt, longest - most, begin)) for i in indices]
            masks = [torch.ones_like(row) for row in ids]
            return {
                "input_ids": pad_sequence(ids, True, pad, padding_side="left"),
                "attention_mask": pad_sequence(masks, True, 0, padding_side="left"),
            }

        def decode(ids: list[int]) -> str:
            return str(processor.decode(ids, skip_special_tokens=True))

        writing = generation.Writing(to_continue, decode, None, (end,), pad, most)
    return generation.examples_of(rows, texts, tokens, _item, pad, truncated, writing, file.normalise == "tokens")


def _item(prompt: list[int], answer: list[int]) -> Batch:
    """The model reads all but the end, and foretells the answer from the prompt's last token on."""
    ids = torch.tensor([*prompt, *answer[:-1]])
    labels = torch.tensor([IGNORED] * (len(prompt) - 1) + answer)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _cut_front(prompt: list[int], room: int, begin: int | None) -> list[int]:
    """The prompt's last tokens, after the one that begins every text, if it begins this one.

    >>> _cut_front([1, 5, 6, 7], 3, begin=1), _cut_front([5, 6, 7], 2, begin=1)
    ([1, 6, 7], [6, 7])
    """
    if len(prompt) <= room:
        return prompt
    if prompt[0] == begin and room > 1:
        return [prompt[0], *prompt[1 - room :]]
    return prompt[-room:]


def _running(processor: Any, texts: list[str], end: int) -> list[list[int]]:
    """Texts that go on: with the token that begins a text, without one that ends it."""
    found = processor(texts, verbose=False)["input_ids"]
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in found]


def _continuations(processor: Any, text: Text, prompt: list[int], end: int) -> list[list[int]]:
    """The answers' tokens as they are in the running text, a space before them unless the prompt ends in white space.

    Where the tokenizer would merge across the border, an answer's own.
    """
    space = "" if text.prompt[-1].isspace() else " "
    whole = _running(processor, [text.prompt + space + answer for answer in text.answers], end)
    return [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt and len(ids) > len(prompt) else _plain(processor, answer)
        for ids, answer in zip(whole, text.answers, strict=True)
    ]


def _plain(processor: Any, text: str) -> list[int]:
    ids: list[int] = processor(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _require_chat_template(processor: Any) -> None:
    if not processor.chat_template:
        raise PimergeError(
            "the base's tokenizer has no chat template", "leave out 'chat' in task.json, or take an instruct model"
        )


def _turn(processor: Any, prompt: str) -> str:
    """A user's turn, and the beginning of the assistant's."""
    turn: str = processor.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return turn


def _end_of_turn(processor: Any, end: int) -> int:
    """What the chat template puts behind an answer, if that is one special token; else the end of a text."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    _, found, behind = processor.apply_chat_template(turns, tokenize=False).rpartition("answer")
    following = _plain(processor, behind) if found else []
    special = {*processor.all_special_ids, *processor.added_tokens_decoder}
    return following[0] if following and following[0] in special else end
