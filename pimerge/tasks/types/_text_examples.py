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
    """What a model of text alone reads besides tokens."""
    return {}


@dataclass(frozen=True)
class Prompts:
    """What the model is asked in each row.

    Attributes:
        tokens: each prompt, whole.
        cut: place of a row, tokens that there is room for → its prompt without what there is no room for.
        beside: place of a row, what is read in tokens, how many of these are the answer's → what is read besides, such
            as an image; a tensor of one dimension has a number for each token, any other its examples first.
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
        right: which of them is the row's.
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
        start: what an encoder-decoder's answer starts from; None for a causal model.
        ends: tokens that end an answer.
        pad: what fills up after the end.
        most: tokens of an answer.
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
        answered: place of an example, one of its candidates → the example as the model takes it.
        texts: each example in words.
        writing: how answers are generated; None where the likeliest candidate is the answer.
        per_token: whether the likeliest is so by the mean over its tokens, not by their sum.
        asked: some examples → their prompts alone, padded on the left; None for a base with an encoder and a decoder.
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
