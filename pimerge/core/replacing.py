"""What an output file may take the place of."""

from __future__ import annotations

import json
from pathlib import Path

from pimerge.core.errors import PimergeError
from pimerge.core.files import disk_errors, require_absent
from pimerge.core.placement import encoded


def require_same_or_absent(path: Path, content: bytes | str, force: bool) -> None:
    """Refuse to overwrite ``path`` without ``force``, unless it already holds exactly this content.

    With ``force``, a file of another kind is refused: it may be an input, or something else that was not meant.
    """
    if _content_of(path) != encoded(content):
        require_absent(path, force)
    require_of_one_kind(path, content)


def require_replaceable(path: Path, content: bytes | str, force: bool) -> None:
    """Refuse at once what :func:`require_same_or_absent` will refuse for every content of this one's kind."""
    try:
        require_of_one_kind(path, content)
    except PimergeError:
        require_absent(path, force)
        raise


def require_of_one_kind(path: Path, content: bytes | str) -> None:
    """Refuse to overwrite a folder, or a file of another kind than this content."""
    found = _content_of(path)
    if path.is_dir() or (found and not _is_of_one_kind(found, encoded(content))):
        kind = "folder" if path.is_dir() else "file of another kind than the output"
        raise PimergeError(
            f"'{path}' is a {kind}, so --force does not replace it",
            "remove it yourself, or choose another --output",
        )


def _content_of(path: Path) -> bytes:
    with disk_errors(path):
        return path.read_bytes() if path.is_file() else b""


def _is_of_one_kind(one: bytes, other: bytes) -> bool:
    """Whether two files are JSON documents that share half of their fields, or other files that start alike."""
    try:
        first, second = json.loads(one), json.loads(other)
    except (ValueError, RecursionError):
        return one[:2] == other[:2]
    if isinstance(first, dict) and isinstance(second, dict):
        shared, all_fields = ({*first} & {*second}) - {"schema_version"}, ({*first} | {*second}) - {"schema_version"}
        return 2 * len(shared) >= len(all_fields)  # a ranking and scores both name a target
    return type(first) is type(second)
