"""Random changes to valid documents, for tests that whatever is read is either used or refused in words."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

WEIRD: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, float("nan"), 10**30, "", "x", "\ud800", "\0", "../x", "/etc/passwd", "a" * 5000,
    "(x+)+$", [], {}, [[]], [None], [1, "a"], {"a": {"b": None}}, {"": 0},
]  # fmt: skip
PIECES = [
    b"",
    b'"',
    b"{",
    b"]",
    b",",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"\xe9",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"- &a [*a]\n",
]


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items)[:40]:
        yield from places(value, (*path, key))


def edited(document: Any, path: tuple[Any, ...], change: str, value: Any) -> Any:
    """A copy with one value dropped, replaced, nested or doubled."""
    if not path:
        return {"drop": None, "replace": value, "nest": [document], "double": {"a": document}}[change]
    found = copy.deepcopy(document)
    parent = found
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if change == "drop":
        del parent[key]
    elif change == "replace":
        parent[key] = value
    elif change == "nest":
        parent[key] = [parent[key]]
    else:
        parent[key] = {str(key): parent[key]}
    return found


@st.composite
def json_files(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document with one to three changes, sometimes of its bytes as well."""
    for _ in range(draw(st.integers(0, 2)) + 1):
        path = draw(st.sampled_from(list(places(document))))
        change = draw(st.sampled_from(["drop", "replace", "replace", "nest", "double"]))
        document = edited(document, path, change, draw(st.sampled_from(WEIRD)))
    content = json.dumps(document).encode()
    return draw(changed_bytes(content)) if draw(st.integers(0, 5)) == 0 else content


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with one to three places cut out or overwritten, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        place, removed = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 4, len(content)]))
        content = content[:place] + draw(st.sampled_from(PIECES)) + content[place + removed :]
    return content


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise if the block takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
