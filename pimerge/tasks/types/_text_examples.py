"""Examples that are answered in text: prompts, candidate answers, and generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.schema import TaskFile
from pimerge.tasks.types._templates import Text


@dataclass(frozen=True)
class TextRows:
    """Rows as texts.

    Attributes:
        rows: rows of the split.
        texts: texts of each row.
        file: description of the task.
        by_likelihood: whether the answer is the likeliest candidate, instead of generated text.
    """

    rows: Rows
    texts: Sequence[Text]
    file: TaskFile
    by_likelihood: bool


@dataclass(frozen=True)
class Prompts:
    """The prompt of each row as tokens.

    Attributes:
        tokens: each prompt, uncut.
        cut: position of a row, room in tokens → its prompt, cut to fit.
        beside: position of a row, its input tokens, number of answer tokens among them → other inputs, such as an
            image. A one-dimensional tensor has a value for each token; others have the examples as first axis.
        alike: see :class:`Examples`.
    """

    tokens: Sequence[list[int]]
    cut: Callable[[int, int], list[int]]
    beside: Callable[[int, list[int], int], Batch] = lambda place, ids, answered: {}  # text alone
    alike: bool = True


@dataclass(frozen=True)
class Tokens:
    """A row as tokens.

    Attributes:
        prompt: tokens of the prompt.
        answers: tokens of each candidate, with an end token.
        right: index of the right answer.
    """

    prompt: list[int]
    answers: list[list[int]]
    right: int


@dataclass(frozen=True)
class Writing:
    """Settings for generating answers.

    Attributes:
        prompts: indices → batch of prompts for ``generate``.
        decode: tokens → text.
        start: first token of an encoder-decoder's answer; None for a causal model.
        ends: tokens that end an answer.
        pad: padding token after the end.
        most: maximum number of tokens of an answer.
    """

    prompts: Callable[[Sequence[int]], Batch]
    decode: Callable[[list[int]], str]
    start: int | None
    ends: tuple[int, ...]
    pad: int
    most: int


@dataclass(frozen=True, kw_only=True)
class TextExamples(Examples):
    """Examples that are answered in text.

    Attributes:
        tokens: tokens of each example.
        answered: position of an example, index of a candidate → the model's input with this answer.
        texts: texts of each example.
        writing: generation settings; None if the answer is the likeliest candidate.
        per_token: whether candidates are compared by the mean of log p over their tokens, instead of the sum.
        asked: indices → batch of prompts alone, padded on the left; None for encoder-decoders.
    """

    tokens: Sequence[Tokens]
    answered: Callable[[int, int], Batch]
    texts: Sequence[Text]
    writing: Writing | None
    per_token: bool
    asked: Callable[[Sequence[int]], Batch] | None

    def labelled(self, index: int, label: int) -> Batch:
        """Example i with another candidate as its answer."""
        return self.answered(index, label)
