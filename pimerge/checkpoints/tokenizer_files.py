"""The files of a tokenizer in a model's or an adapter's folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Container, Mapping
from pathlib import Path

from pimerge.core.files import read_json

_MAIN = frozenset(
    """tokenizer.json tokenizer.model tokenizer_config.json vocab.json vocab.txt merges.txt spiece.model source.spm
    target.spm sentencepiece.bpe.model sentencepiece.model spm.model tekken.json""".split()  # noqa: SIM905
)
_RESERVED = re.compile(r"unused|reserved|placeholder|(control|special|extra)_?(id|token)?_?\d", re.IGNORECASE)
_BESIDE = frozenset({"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"})


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder; none if there is no tokenizer."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name in _MAIN | _BESIDE)
    return found if any(path.name in _MAIN for path in found) else []


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Replace the tokenizer in a folder by that of another one; False, with nothing changed, if that has none."""
    found = tokenizer_files(source)
    if not found:
        return False
    for path in tokenizer_files(folder):
        path.unlink()
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return True


def tokens_of(folder: Path) -> dict[int, str] | None:
    """The tokens by number of the tokenizer in a folder; None if its vocabulary is not in a file that is read here."""
    found: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        document = read_json(folder / "tokenizer.json")
        vocabulary = document.get("model", {}).get("vocab") or {}
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((p[0], n) for n, p in enumerate(vocabulary))
        found = dict(pairs) | {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
    elif (folder / "vocab.json").is_file():
        found = dict(read_json(folder / "vocab.json"))
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        found = {token: number for number, token in enumerate(lines)}
    if not found:
        return None
    if (folder / "added_tokens.json").is_file():
        found |= read_json(folder / "added_tokens.json")
    return {number: token for token, number in found.items()}


def first_other_token(
    first: Mapping[int, str] | None, second: Mapping[int, str] | None, rows: Container[int]
) -> int | None:
    """The first row that stands for other tokens in two vocabularies; None if there is none or one is not known.

    A token that one of them only keeps free, such as ``<|reserved_special_token_0|>``, can have a name in the other.

    >>> first_other_token({0: "a", 1: "[unused1]"}, {0: "b", 1: "<image>"}, range(2))
    0
    """
    if first is None or second is None:
        return None
    differing = (n for n in first.keys() & second.keys() if n in rows and first[n] != second[n])
    return min((n for n in differing if not (_RESERVED.search(first[n]) or _RESERVED.search(second[n]))), default=None)
