"""Encode rows as text for the types that answer in text.

Layout: ``labels`` (batch × tokens) are aligned with the outputs that predict them (so they are already shifted for a
causal model), and −100 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED, Batch
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.types._templates import fill_in
from pimerge.tasks.types._text_examples import Prompts, TextExamples, TextRows, Tokens, Writing

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.examples import Rows
    from pimerge.tasks.schema import TaskFile

COLUMNS = {"label": False}
FIELDS = frozenset({"prompt", "answer", "verbalizer", "scoring", "metrics", "max_new_tokens"})
_USUAL_NEW_TOKENS = 64
_TOKENS = ("input_ids", "decoder_input_ids")


def in_words(rows: Rows, file: TaskFile) -> TextRows:
    """Fill in the task's templates for each row."""
    scoring = file.scoring or ("generation" if file.labels is None else "likelihood")
    return TextRows(rows, fill_in(rows, file), file, scoring == "likelihood")


def examples_of(
    worded: TextRows,
    prompts: Prompts,
    tokens: Sequence[Tokens],
    truncated: int,
    *,
    answered: Callable[[int, int], Batch],
    pad: int,
    writing: Writing | None,
    asked: Callable[[Sequence[int]], Batch] | None = None,
) -> TextExamples:
    """Combine the encoded parts into examples."""
    return TextExamples(
        [len(row.prompt) + len(row.answers[row.right]) for row in tokens],
        lambda index: answered(index, tokens[index].right),
        lambda batch: collate(batch, pad),
        truncated,
        [text.references for text in worded.texts],
        prompts.alike,
        tokens=tokens,
        answered=answered,
        texts=worded.texts,
        writing=writing,
        per_token=worded.file.normalise == "tokens",
        asked=asked,
    )


def collate(examples: Sequence[Batch], pad: int, side: str = "right") -> Batch:
    """Collate several examples into a batch, with tokens padded on one side."""
    from torch.nn.utils.rnn import pad_sequence

    found = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if first.dim() == 1:
            value = pad if name in _TOKENS else IGNORED if name == "labels" else 0
            found[name] = pad_sequence(values, True, value, padding_side=side)
        else:
            found[name] = _joined(values)
    return found


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors on their first axis, padded with zeros to the largest on the others.

    >>> import torch
    >>> _joined([torch.ones(1, 1), torch.ones(1, 2)]).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    import torch

    sizes = [max(size) for size in zip(*(value.shape[1:] for value in values), strict=True)]
    fill = [
        [part for size, own in reversed(list(zip(sizes, value.shape[1:], strict=True))) for part in (0, size - own)]
        for value in values
    ]
    return torch.cat([torch.nn.functional.pad(value, more) for value, more in zip(values, fill, strict=True)])


def fit(
    worded: TextRows, prompts: Prompts, answers: Sequence[list[list[int]]], longest: int, room: Callable[[int], int]
) -> tuple[list[Tokens], int]:
    """Cut prompts that are too long, but never answers, and count the cut prompts.

    Args:
        longest: maximum number of tokens of an answer.
        room: tokens of a row's longest candidate → maximum number of tokens of its prompt.
    """
    problems = RowProblems(worded.rows.where, worded.rows.numbers)
    found, truncated = [], 0
    for place, (prompt, candidates, text) in enumerate(zip(prompts.tokens, answers, worded.texts, strict=True)):
        with problems.row(place):
            if (most := max(map(len, candidates))) > longest:
                raise PimergeError(
                    f"the answer has {most} tokens with its end, and there is room for {longest}",
                    "shorten the answer or leave the row out",
                )
            kept = prompts.cut(place, room(most))
            truncated += len(kept) < len(prompt)
            found.append(Tokens(kept, candidates, text.right))
    problems.raise_any()
    return found, truncated


def new_tokens(file: TaskFile, longest: int, answers: Sequence[list[list[int]]]) -> int:
    """The maximum number of tokens to generate: the task's setting, or enough for all of its answers.

    Args:
        longest: maximum number of tokens that fit the model.
    """
    if file.max_new_tokens is not None:
        if file.max_new_tokens > longest:
            raise PimergeError(
                f"max_new_tokens is {file.max_new_tokens}, and the model has room for {longest}", "ask for fewer"
            )
        return file.max_new_tokens
    needed = max(len(candidate) for row in answers for candidate in row)
    return min(longest, needed if file.labels else max(needed, _USUAL_NEW_TOKENS))


def decoding(tokenizer: Any, answers: Sequence[list[list[int]]]) -> Callable[[list[int]], str]:
    """Make a function that decodes generated tokens, without special tokens unless answers contain meaningful ones.

    Florence-2's positions, such as ``<loc_12>``, are meaningful special tokens.
    """
    named = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    control = {getattr(tokenizer, f"{name}_token_id", None) for name in named}
    meaningful = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - control
    kept_special = not meaningful.isdisjoint(token for row in answers for answer in row for token in answer)

    def decode(ids: list[int]) -> str:
        kept = [token for token in ids if token not in control] if kept_special else ids
        return str(tokenizer.decode(kept, skip_special_tokens=not kept_special))

    return decode


def end_token(processor: Any, config: Any) -> int:
    """The token that ends an answer."""
    own = config.eos_token_id
    found = processor.eos_token_id if processor.eos_token_id is not None else own[0] if isinstance(own, list) else own
    if found is None:
        raise PimergeError(
            "neither the tokenizer nor the model's config has an end token, so answers would not end",
            "set eos_token in the base's tokenizer",
        )
    return int(found)
