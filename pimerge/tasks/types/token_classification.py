"""A class for each word of a sentence (columns ``tokens`` and ``labels``, two lists of one length).

The first token of a word predicts its class; −log p(y|x) of a sentence is the sum over its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED, Batch, Examples, Rows, Scored, on_device
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types._classification import FIELDS, invert_distribution
from pimerge.tasks.types._likelihood import logits, nll
from pimerge.tasks.types._tokenizer import load_processor as load_tokenizer
from pimerge.tasks.types._tokenizer import longest_input, padded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile


class WordExamples(Examples):
    """Sentences whose words have classes."""

    def labelled(self, index: int, label: Sequence[int]) -> Batch:
        """Sentence i with other classes for its words."""
        import torch

        example = self.get(index)
        labels = example["labels"].clone()
        labels[labels != IGNORED] = torch.tensor(label)
        return {**example, "labels": labels}


def load_processor(source: str, revision: str | None) -> Any:
    """Load the base's tokenizer; one that cannot map tokens to words is a ValueError, as in transformers."""
    tokenizer = load_tokenizer(source, revision)
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer does not tell which word a token is of (tokenizer.json)")
    return tokenizer


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every sentence once; a sentence longer than the model's maximum loses its last words."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    longest = longest_input(processor, config)
    problems = RowProblems(rows.where, rows.numbers)
    fields: list[Batch] = []
    classes: list[list[int]] = []
    truncated = 0
    for place, words in enumerate(rows.table[rows.columns["tokens"]]):
        with problems.row(place):
            _require_words(words, rows.words[place])
            encoded = _split(words, processor, truncation=True, max_length=longest)
            firsts = _first_tokens(encoded.word_ids())
            kept = _kept_words(words, firsts, processor, longest)
            truncated += kept < len(words)
            labels = [IGNORED] * len(encoded["input_ids"])
            for word, token in firsts.items():
                labels[token] = rows.words[place][word]
            fields.append({name: torch.tensor(encoded[name]) for name in encoded} | {"labels": torch.tensor(labels)})
            classes.append(list(rows.words[place][:kept]))
    problems.raise_any()

    def collate(examples: Sequence[Batch]) -> Batch:
        labels = [example["labels"] for example in examples]
        return {
            **padded(processor, examples),
            "labels": pad_sequence(labels, True, IGNORED, padding_side=processor.padding_side),
        }

    lengths = [len(example["input_ids"]) for example in fields]
    return WordExamples(lengths, fields.__getitem__, collate, truncated, classes=classes)


def _require_words(words: Any, classes: Sequence[int]) -> None:
    if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise PimergeError(f"the tokens are {words!r}", "expected a list of words")
    if not words:
        raise PimergeError("there are no words", "leave the row out")
    if len(words) != len(classes):
        raise PimergeError(f"there are {len(words)} words and {len(classes)} labels", "give each word one")


def _split(words: Sequence[str], processor: Any, **options: Any) -> Any:
    """Tokenize a sentence; if the tokenizer's words include the space before them, each word gets a space."""
    space = " " if "ByteLevel" in repr(processor.backend_tokenizer.pre_tokenizer) else ""
    return processor([space + word for word in words], is_split_into_words=True, **options)


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Word → its first token.

    >>> _first_tokens([None, 0, 0, 1, None])
    {0: 1, 1: 3}
    """
    found: dict[int, int] = {}
    for token, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, token)
    return found


def _kept_words(words: Sequence[str], firsts: Mapping[int, int], processor: Any, longest: int) -> int:
    """Count the words that fit."""
    kept = max(firsts, default=-1) + 1
    if kept < len(words):  # cut off, unless these words have no tokens at all
        whole = _first_tokens(_split(words, processor, verbose=False).word_ids())
        missing = [word for word in range(len(words)) if word not in whole]
    else:
        missing = [word for word in range(kept) if word not in firsts]
    if missing:
        raise PimergeError(
            f"the word {missing[0]} (from 0), {words[missing[0]]!r}, has no token", "leave it out, and its label"
        )
    if not kept:
        raise PimergeError(f"there is room for {longest} tokens, which is not enough for one word", "use another base")
    return kept


def draw(model: nn.Module, examples: Examples, indices: Sequence[int], uniform: Tensor) -> list[list[int]]:
    """Sample the class of every word; a sentence's number in ``uniform`` (n) seeds the numbers of its words."""
    import torch

    found = []
    for answers, number in zip(_of_words(model, examples, indices), uniform.tolist(), strict=True):
        generator = torch.Generator().manual_seed(int(number * 2**53))
        found.append(invert_distribution(answers, torch.rand(len(answers), generator=generator, dtype=torch.float64)))
    return found


def score(model: nn.Module, examples: Examples, indices: Sequence[int]) -> Scored:
    """Score sentences: −log p(y|x), the likeliest classes of the words, and whether all of them are right."""
    import torch
    from torch.nn.functional import cross_entropy

    answers, truth = _of_words(model, examples, indices), [examples.classes[index] for index in indices]
    pairs = list(zip(answers, truth, strict=True))
    losses = [cross_entropy(row, torch.tensor(classes), reduction="sum") for row, classes in pairs]
    chosen = [row.argmax(1).tolist() for row in answers]
    return Scored(torch.stack(losses), [a == b for a, b in zip(chosen, truth, strict=True)], chosen)


def _of_words(model: nn.Module, examples: Examples, indices: Sequence[int]) -> list[Tensor]:
    """The logits of each sentence's words, (words × classes), in float32 or wider."""
    import torch

    batch = on_device(examples.batch(indices), next(model.parameters()).device)
    with torch.no_grad():
        found = logits(model, batch)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return [row[labels != IGNORED].cpu() for row, labels in zip(found, batch["labels"], strict=True)]


def read(
    model: nn.Module, reading: Mapping[str, nn.Module], examples: Examples, indices: Sequence[int], answers: bool
) -> tuple[Tensor, Tensor | None]:
    """Raise an error: a sentence has a vector per word, but ranking by examples needs one per example."""
    raise PimergeError("a sentence has no single vector to rank by", "rank by a measure of the store")


TASK_TYPE = TaskType(
    name="token-classification",
    summary="A class for each word of a sentence (columns ``tokens`` and ``labels``, two lists of one length).",
    auto_model="AutoModelForTokenClassification",
    peft_task="TOKEN_CLS",
    trains_head=True,
    columns={"tokens": True, "labels": True},
    usual_columns={"tokens": ("tokens", "words"), "labels": ("labels", "ner_tags")},
    fields=FIELDS,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
