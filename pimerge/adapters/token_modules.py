"""Modules with one row or column of ΔW for each token, and vocabularies of several sizes among experts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.keys import OF_TOKENS, is_saved_embedding, parameter_of
from pimerge.adapters.lora_module import LoraModule
from pimerge.checkpoints.tokenizer_files import first_other_token, tokenizer_files, tokens_of
from pimerge.checkpoints.vocabularies import vocabulary_of
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json


def token_axis(module: LoraModule) -> int | None:
    """The axis of ΔW (d_out × d_in) that has the tokens: 1 for an embedding, 0 for an output layer, None for others."""
    if module.parameter is not None or module.name.rpartition(".")[2] not in OF_TOKENS:
        return None
    return 1 if module.layer == "embedding" else 0


def form_of(module: LoraModule) -> tuple[object, ...]:
    """What the updates of a module must have in common to be summed: all but the number of tokens."""
    axis = token_axis(module)
    d_out, d_in = (None if axis == 0 else module.d_out), (None if axis == 1 else module.d_in)
    return module.layer, d_out, d_in, module.shape_A[2:]


def token_count(expert: Expert) -> int | None:
    """The size of an expert's vocabulary, or that of its base if it holds no part of it; None if neither is known."""
    for name, key in expert.head.items():
        module, _, end = parameter_of(name).rpartition(".")
        if end == "weight" and module.rpartition(".")[2] in OF_TOKENS and is_saved_embedding(name, expert.modules):
            return expert.file.entries[key].shape[0]
    for module_ in expert.modules.values():
        if (axis := token_axis(module_)) is not None:
            return module_.d_in if axis == 1 else module_.d_out
    folder = expert.base.folder
    if folder is None or not (folder / "config.json").is_file():
        return None
    return vocabulary_of(read_json(folder / "config.json"))


def rows_have(expert: Expert, module: LoraModule) -> int | None:
    """The number of tokens for which an expert can have an update in a module; None if it is not known."""
    own = expert.modules.get(module.name)
    if own is None:
        return token_count(expert)
    return own.d_in if token_axis(module) == 1 else own.d_out


def require_same_tokens(holders: Sequence[tuple[Expert, Collection[int]]]) -> str:
    """Refuse experts whose tokenizers give other tokens to the same rows; a sentence if their vocabularies differ.

    Without a tokenizer in an expert's folder, rows of the same number count as the same token.

    Args:
        holders: experts, and the numbers of the tokens that each has rows for.
    """
    if len(holders) < 2:
        return ""
    problems = Problems()
    known = [(expert, rows, tokens_of(expert.folder)) for expert, rows in holders]
    first = next(((expert, rows, tokens) for expert, rows, tokens in known if tokens is not None), None)
    for expert, rows, tokens in known:
        if first is None or tokens is None or expert is first[0]:
            continue
        other = first[2] or {}
        number = first_other_token(tokens, other, {row for row in rows if row in first[1]})
        if number is not None:
            problems.add(
                f"token {number} is {other[number]!r} in '{first[0].name}' and {tokens[number]!r} in '{expert.name}', "
                "by their tokenizers, so their rows do not stand for the same tokens",
                "leave one of them out, or their embeddings: --head none for saved ones, --exclude for their updates",
            )
    problems.raise_any("the vocabularies of these experts do not fit each other")
    sizes = sorted({len(rows) for _, rows in holders})
    if len(sizes) < 2 or not all(isinstance(rows, range) for _, rows in holders):
        return ""
    by_number = [f"'{expert.name}'" for expert, _, tokens in known if tokens is None]
    how = f" (by number: {', '.join(by_number)} has no tokenizer in its folder)" if by_number else ""
    return (
        f"vocabularies of {', '.join(map(str, sizes))} tokens: their common rows are merged{how}, and the others are "
        "copied from the expert that has them, or averaged over several"
    )


def tokenizer_folder(experts: Sequence[Expert], modules: Iterable[LoraModule], head: Head) -> Path | None:
    """The folder with the tokenizer of a merge of experts: of those with the largest vocabulary, that with most tokens.

    Args:
        modules: the modules that the merge updates.
        head: what the merge holds of the base.

    Returns:
        None if the merge holds nothing of a vocabulary, so that the base's tokenizer fits, or no expert has one.
    """
    saved = {parameter_of(name).removesuffix(".weight").rpartition(".")[2] for name in head.tensors}
    has_rows = head.token_indices or any(part.has_rows for expert in experts for part in expert.tensor_sets.values())
    if not (has_rows or saved & OF_TOKENS or any(token_axis(module) is not None for module in modules)):
        return None
    counts = [token_count(expert) or 0 for expert in experts]
    largest = [expert.folder for expert, count in zip(experts, counts, strict=True) if count == max(counts)]
    found = [folder for folder in largest if tokenizer_files(folder)]
    return max(found, key=lambda folder: len(tokens_of(folder) or ()), default=None)


def require_one_shape(experts: Sequence[Expert]) -> None:
    """Refuse updates with different numbers of tokens, for methods that compare the factors entry by entry."""
    for name in sorted({name for expert in experts for name in expert.modules}):
        found = {expert.name: expert.modules[name] for expert in experts if name in expert.modules}
        if len({(module.d_out, module.d_in) for module in found.values()}) > 1:
            raise PimergeError(
                f"'{name}' has another number of tokens in {' and '.join(map(repr, found))}, so their factors cannot "
                "be compared entry by entry",
                f"use a method that works on ΔW, such as uniform or ties, or leave it out: --exclude '{name}'",
            )
