"""Names of files in documents that somebody else may have written."""

from __future__ import annotations

from typing import Any


def is_plain_name(name: Any) -> bool:
    """Whether a value is the name of a file in the folder of its document, and leads nowhere else.

    >>> [is_plain_name(name) for name in ("a.safetensors", "../a", "/a", "a/b", "..", "", 3)]
    [True, False, False, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def is_inside(path: Any) -> bool:
    """Whether a value is a relative path of plain names.

    >>> [is_inside(path) for path in ("a/b", "a", "a/../b", "/a", "a//b")]
    [True, True, False, False, False]
    """
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))
