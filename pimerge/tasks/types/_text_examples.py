"""Examples that are answered in text: what the model reads, the candidate answers, and how answers are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.schema import TaskFile
from pimerge.tasks.types._templates import Text


@dataclass(frozen=True)
class TextRows:
    """Rows in words.

    Attributes:
        rows: of the split.
        texts: each row in words.
        file: the task.
        by_likelihood: whether the likeliest candidate is the answer, and not what the model writes.
    """

    rows: Rows
    texts: Sequence[Text]
    file: TaskFile
    by_likelihood: bool


def nothing_beside(place: int, ids: list[int], answered: int) -> Batch:
    """The inputs besides tokens of a model that reads only text."""
    return {}


@dataclass(frozen=True)
class Prompts:
    """The prompt of each row in tokens.

    Attributes:
        tokens: each prompt, uncut.
        cut: position of a row, room in tokens → its prompt, cut to fit.
        beside: position of a row, its input tokens, the number of those that belong to the answer → other inputs, such
            as an image; a tensor of one dimension has a number for each token, any other has the examples first.
        alike: as :class:`Examples` has it.
    """

    tokens: Sequence[list[int]]
    cut: Callable[[int, int], list[int]]
    beside: Callable[[int, list[int], int], Batch] = nothing_beside
    alike: bool = True


@dataclass(frozen=True)
class Tokens:
    """A row in tokens.

    Attributes:
        prompt: what the model reads.
        answers: each candidate, with its end.
        right: the index of the row's own answer.
    """

    prompt: list[int]
    answers: list[list[int]]
    right: int


@dataclass(frozen=True)
class Writing:
    """How answers are generated.

    Attributes:
        prompts: the prompts of some examples as ``generate`` takes them.
        decode: tokens → text.
        start: the first token of an encoder-decoder's answer; None for a causal model.
        ends: tokens that end an answer.
        pad: the token after the end.
        most: the most tokens of an answer.
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
        tokens: of each example.
        answered: position of an example, index of a candidate → the model's input with this answer.
        texts: each example in words.
        writing: how answers are generated; None where the likeliest candidate is the answer.
        per_token: whether candidates are compared by the mean of log p over their tokens, not by the sum.
        asked: some examples → only their prompts, padded on the left; None for a base with an encoder and a decoder.
    """

    tokens: Sequence[Tokens]
    answered: Callable[[int, int], Batch]
    texts: Sequence[Text]
    writing: Writing | None
    per_token: bool
    asked: Callable[[Sequence[int]], Batch] | None

    def labelled(self, index: int, label: int) -> Batch:
        """Example i with another candidate for its answer."""
        return self.answered(index, label)
