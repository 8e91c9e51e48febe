"""Checkpoints of one model whose vocabularies have several sizes, as views of one size.

The first tokens of the smaller vocabulary must be the same tokens in all, as their tokenizers show. The rows of the
other tokens are taken from where they are: the first checkpoint that has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import size_of, torch_dtype
from pimerge.checkpoints.key_mapping import align, names_of, skeleton
from pimerge.checkpoints.safetensors_file import PIECE, TensorFile, bytes_of
from pimerge.checkpoints.tokenizer_files import first_other_token, tokens_of
from pimerge.core.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowsFrom:
    """Rows of a tensor: those from ``start`` to ``stop`` of a tensor in a file."""

    file: TensorFile
    key: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class GrownFile(TensorFile):
    """A view of a file in which some tensors have further rows, of other files.

    Attributes:
        rows: key → the rows of each grown tensor, in order.
    """

    rows: Mapping[str, Sequence[RowsFrom]]

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        shape = self.entries[key].shape
        return self.read_part(key, 0, math.prod(shape)).view(shape)

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """Read the numbers from ``start`` to ``stop`` of the flattened tensor."""
        if key not in self.rows:
            return super().read_part(key, start, stop)
        import torch

        entry, width = self.entries[key], math.prod(self.entries[key].shape[1:])
        found = []
        for rows in self.rows[key]:  # the rows of a part have the same numbers in its file and in this one
            first, last = max(start, rows.start * width), min(stop, rows.stop * width)
            if first < last:
                found.append(rows.file.read_part(rows.key, first, last).to(torch_dtype(entry.dtype)))
        return torch.cat(found)

    def pieces(self, key: str) -> Iterator[memoryview | bytearray]:
        """Yield the bytes of one tensor of any dtype, at most a piece at once."""
        if key not in self.rows:
            yield from super().pieces(key)
            return
        count, step = math.prod(self.entries[key].shape), PIECE // size_of(self.entries[key].dtype)
        for start in range(0, count, step):
            yield bytes_of(self.read_part(key, start, min(start + step, count)))


@dataclass(frozen=True)
class OneVocabulary:
    """Checkpoints with a vocabulary of one size.

    Attributes:
        checkpoints: the checkpoints, of which some are views.
        largest: the one with the most tokens, whose tokenizer fits all; None if no vocabulary had to grow.
        sentence: what was done; empty if nothing was.
    """

    checkpoints: Sequence[Checkpoint]
    largest: Checkpoint | None = None
    sentence: str = ""


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """The ``vocab_size`` of a config or of its text part; None if neither states it.

    >>> vocabulary_of({"text_config": {"vocab_size": 8}})
    8
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)


def with_vocabulary(settings: Any, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with another ``vocab_size``, where transformers looks it up: in a multimodal model in its text part.

    Args:
        settings: transformers' object of the config.
    """
    text = settings.get_text_config()
    part = next((name for name in settings.sub_configs if getattr(settings, name, None) is text), None)
    if part is None:
        return {**config, "vocab_size": size}
    outer = {"vocab_size": size} if "vocab_size" in config else {}
    return {**config, **outer, part: {**config.get(part, {}), "vocab_size": size}}


def token_parameters(model: Any) -> set[str]:
    """The parameters of a model with one row for each token."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}


def one_vocabulary(
    checkpoints: Sequence[Checkpoint], selected: Callable[[str], bool], problems: Problems
) -> OneVocabulary:
    """Views of the checkpoints, the first of which is the base, with the rows of all tokens.

    A checkpoint whose tokens are not known to be the base's is a problem; of vocabularies of one size, only tokenizers
    that disagree are.

    Args:
        selected: tells by key of the base which tensors matter.
    """
    sizes, base = [vocabulary_of(checkpoint.config) for checkpoint in checkpoints], checkpoints[0]
    if None in sizes:
        return OneVocabulary(checkpoints)
    reasons = _other_tokens(checkpoints)
    model = skeleton(base, base.config) if reasons or len(set(sizes)) > 1 else None
    if model is None:
        return OneVocabulary(checkpoints)
    own = names_of(base)
    keys = [key for key in base.home if own.parameter[key] in token_parameters(model) and selected(key)]
    aligned = [{home: key for key, home in align(own, names_of(each)).items()} for each in checkpoints]
    keys = [key for key in keys if all(key in each for each in aligned)]
    if not keys:
        return OneVocabulary(checkpoints)
    for number, reason in reasons.items():
        problems.add(
            f"'{checkpoints[number].name}' has a vocabulary of {sizes[number]} tokens, the base '{base.name}' of "
            f"{sizes[0]}: {reason}",
            f"leave it out, or keep the base's embeddings: --exclude {' --exclude '.join(keys)}"
            + ("; or save the tokenizer of each beside it" if sizes[number] != sizes[0] else ""),
        )
    if problems.found or len(set(sizes)) == 1:
        return OneVocabulary(checkpoints)
    largest = max(checkpoints, key=lambda each: vocabulary_of(each.config) or 0)
    rows = vocabulary_of(largest.config) or 0
    grown = []
    for number, checkpoint in enumerate(checkpoints):
        parts = {aligned[number][key]: _parts(checkpoints, aligned, number, key, rows) for key in keys}
        grown.append(_grown(checkpoint, parts, with_vocabulary(model.config, checkpoint.config, rows), rows))
    return OneVocabulary(
        grown,
        largest,
        f"vocabularies of {', '.join(map(str, sorted({size for size in sizes if size})))} tokens: their common rows "
        "are merged, the others are copied from the first checkpoint that has them",
    )


def _other_tokens(checkpoints: Sequence[Checkpoint]) -> dict[int, str]:
    """Index of a checkpoint → why its rows are not known to stand for the same tokens as those of the ones before."""
    found: dict[int, str] = {}
    tokens = [None if each.is_file else tokens_of(each.path) for each in checkpoints]
    sizes = [vocabulary_of(each.config) or 0 for each in checkpoints]
    for number in range(1, len(checkpoints)):
        for other in range(number):
            rows = range(min(sizes[number], sizes[other]))
            first, second = tokens[other], tokens[number]
            token = first_other_token(first, second, rows)
            if token is not None and first and second:
                where = f"in '{checkpoints[other].name}'" if other else "in the base"
                found.setdefault(number, f"token {token} is {first[token]!r} {where} and {second[token]!r} here")
        reason = _unknown_rows(tokens[0], tokens[number], sizes[0], sizes[number])
        if reason and number not in found:
            found[number] = reason
    return found


def _unknown_rows(first: Mapping[int, str] | None, second: Mapping[int, str] | None, old: int, new: int) -> str:
    """Why it is not known which tokens the further rows of the larger of two vocabularies are for; empty if it is."""
    if old == new:
        return ""
    if first is None or second is None:
        return "without both tokenizers, it is not known that their common rows stand for the same tokens"
    larger = first if old > new else second
    if not any(min(old, new) <= number < max(old, new) for number in larger):
        return f"its tokenizer names none of the {abs(old - new)} further tokens"
    return ""


def _parts(
    checkpoints: Sequence[Checkpoint], aligned: Sequence[Mapping[str, str]], number: int, key: str, rows: int
) -> list[RowsFrom]:
    """The rows of a tensor: the checkpoint's own, and then those of the first that has more."""
    found: list[RowsFrom] = []
    for place in (number, *range(len(checkpoints))):
        name, start = aligned[place][key], found[-1].stop if found else 0
        stop = min(rows, checkpoints[place].entry(name).shape[0])
        if start < stop:
            found.append(RowsFrom(checkpoints[place].home[name], name, start, stop))
    return found


def _grown(
    checkpoint: Checkpoint, parts: Mapping[str, Sequence[RowsFrom]], config: dict[str, Any], rows: int
) -> Checkpoint:
    """A view of a checkpoint with the given rows, if any of its tensors grows."""
    if all(len(each) == 1 for each in parts.values()):
        return checkpoint
    files = []
    for file in checkpoint.files:
        entries = dict(file.entries)
        for key in parts.keys() & entries.keys():
            shape = (rows, *entries[key].shape[1:])
            size = math.prod(shape) * size_of(entries[key].dtype)
            entries[key] = entries[key]._replace(shape=shape, end=entries[key].start + size)
        files.append(GrownFile(file.path, entries, file.metadata, rows=parts))
    return replace(checkpoint, files=tuple(files), config=config, is_view=True)
