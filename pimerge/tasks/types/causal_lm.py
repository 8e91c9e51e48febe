"""Answers in text by a model that continues its prompt (Llama, Qwen, GPT-2; ``prompt``, ``answer`` or ``labels``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED, Batch, Examples, Rows
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types import _encoding as encoding
from pimerge.tasks.types._generation import draw, read, score
from pimerge.tasks.types._likelihood import nll
from pimerge.tasks.types._templates import Text, check_texts
from pimerge.tasks.types._text_examples import Prompts, TextRows, Writing
from pimerge.tasks.types._tokenizer import load_processor, longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every row once; if prompt and answer are too long together, the prompt is cut at its beginning."""
    return encode_texts(encoding.in_words(rows, file), processor, config)


def encode_texts(worded: TextRows, processor: Any, config: PreTrainedConfig) -> Examples:
    """Encode rows that are already texts."""
    asked = [text.prompt for text in worded.texts]
    if worded.file.chat:
        require_chat_template(processor)
        tokens = [plain(processor, turn(processor, prompt)) for prompt in asked]
    else:
        tokens = running(processor, asked, encoding.end_token(processor, config))

    def cut(place: int, room: int) -> list[int]:
        begins = tokens[place][0] == processor.bos_token_id and room > 1
        return cut_front(tokens[place], room, int(begins))

    return encode_prompts(worded, Prompts(tokens, cut), processor, processor, config)


def encode_prompts(
    worded: TextRows,
    prompts: Prompts,
    processor: Any,
    tokenizer: Any,
    config: PreTrainedConfig,
    *,
    content: Callable[[str], Any] = str,
) -> Examples:
    """Encode the answers to prompts that are already tokens.

    Args:
        processor: the processor with the chat template.
        content: text → content of a chat turn with this text.
    """
    import torch

    end, longest = encoding.end_token(tokenizer, config), longest_input(tokenizer, config)
    if worded.file.chat:
        end = _end_of_turn(processor, tokenizer, content, end)
        answers = [[[*plain(tokenizer, answer), end] for answer in text.answers] for text in worded.texts]
    else:
        answers = [[[*ids, end] for ids in _continuations(tokenizer, text, end)] for text in worded.texts]
    # longest − 1: a prompt has at least one token
    tokens, truncated = encoding.fit(worded, prompts, answers, longest - 1, lambda answer: longest - answer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def reads(index: int, prompt: list[int], answer: list[int]) -> Batch:
        ids = [*prompt, *answer]
        mask = torch.ones(len(ids), dtype=torch.int64)
        return {"input_ids": torch.tensor(ids), "attention_mask": mask, **prompts.beside(index, ids, len(answer))}

    def answered(index: int, candidate: int) -> Batch:
        # the model reads all but the end token, and predicts the answer from the prompt's last token onwards
        prompt, answer = tokens[index].prompt, tokens[index].answers[candidate]
        labels = torch.tensor([IGNORED] * (len(prompt) - 1) + answer)
        return {**reads(index, prompt, answer[:-1]), "labels": labels}

    def to_continue(kept: Sequence[list[int]]) -> Callable[[Sequence[int]], Batch]:
        # padded on the left, so every answer directly follows its prompt
        return lambda indices: encoding.collate([reads(index, kept[index], []) for index in indices], pad, "left")

    writing = None
    if not worded.by_likelihood:
        most = encoding.new_tokens(worded.file, longest - 1, answers)
        short = [prompts.cut(place, min(len(row.prompt), longest - most)) for place, row in enumerate(tokens)]
        decode = encoding.decoding(tokenizer, answers)
        writing = Writing(to_continue(short), decode, None, (end,), pad, most)
    asked = to_continue([row.prompt for row in tokens])
    return encoding.examples_of(
        worded, prompts, tokens, truncated, answered=answered, pad=pad, writing=writing, asked=asked
    )


def cut_front(prompt: list[int], room: int, kept: int) -> list[int]:
    """Cut a prompt to ``room`` tokens: its first ``kept`` tokens, and the last of the others.

    >>> cut_front([1, 5, 6, 7], 3, kept=1), cut_front([5, 6, 7], 2, kept=0)
    ([1, 6, 7], [6, 7])
    """
    return prompt if len(prompt) <= room else [*prompt[:kept], *prompt[len(prompt) + kept - room :]]


def running(processor: Any, texts: list[str], end: int) -> list[list[int]]:
    """Tokenize unfinished texts: with the begin token, without the end token."""
    found = processor(texts, verbose=False)["input_ids"]
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in found]


def _continuations(processor: Any, text: Text, end: int) -> list[list[int]]:
    """Tokenize the answers as continuations of the prompt, after a space unless the prompt ends in white space.

    If the tokenizer merges tokens across the border, the answer is tokenized by itself.
    """
    space = "" if text.prompt[-1].isspace() else " "
    prompt, *whole = running(processor, [text.prompt, *(text.prompt + space + answer for answer in text.answers)], end)
    return [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt and len(ids) > len(prompt) else plain(processor, answer)
        for ids, answer in zip(whole, text.answers, strict=True)
    ]


def plain(processor: Any, text: str) -> list[int]:
    """Tokenize a text without special tokens."""
    ids: list[int] = processor(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def require_chat_template(processor: Any) -> None:
    """Check that the base has a chat template."""
    if not processor.chat_template:
        raise PimergeError(
            "the base's tokenizer has no chat template", "leave out 'chat' in task.json, or use an instruct model"
        )


def turn(processor: Any, content: Any) -> str:
    """Render a user's turn and the beginning of the assistant's turn."""
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def _end_of_turn(processor: Any, tokenizer: Any, content: Callable[[str], Any], end: int) -> int:
    """The special token that the chat template puts after an answer; by default the end token."""
    turns = [{"role": "user", "content": content("question")}, {"role": "assistant", "content": content("answer")}]
    _, found, behind = processor.apply_chat_template(turns, tokenize=False).rpartition("answer")
    following = plain(tokenizer, behind) if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return following[0] if following and following[0] in special else end


TASK_TYPE = TaskType(
    name="causal-lm",
    summary="Answers in text by a model that continues its prompt (Llama, Qwen, GPT-2).",
    auto_model="AutoModelForCausalLM",
    peft_task="CAUSAL_LM",
    trains_head=False,
    columns=encoding.COLUMNS,
    fields=encoding.FIELDS | {"chat"},
    answers=("texts",),
    check=check_texts,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
