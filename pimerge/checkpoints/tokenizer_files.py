"""The files of a tokenizer in a model's or an adapter's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

_MAIN = frozenset(
    """tokenizer.json tokenizer.model tokenizer_config.json vocab.json vocab.txt merges.txt spiece.model source.spm
    target.spm sentencepiece.bpe.model sentencepiece.model spm.model tekken.json""".split()  # noqa: SIM905
)
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
