"""Report progress and remarks from library functions, independent of how they are displayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[..., None]
"""``advance(steps=1, note="")`` reports completed steps; the note is shown beside the progress bar."""

Track: TypeAlias = Callable[[str, int, str], AbstractContextManager[Advance]]
"""``track(description, total, unit)`` opens a progress report and yields its ``advance``."""


Note: TypeAlias = Callable[[str], None]
"""``note(message)`` reports a remark to the user that is not a result."""


def unheard(message: str) -> None:
    """Ignore a remark: the default ``note`` of library functions."""


@contextmanager
def silent(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Report nothing: the default ``track`` of library functions.

    >>> with silent("Fisher", 2, "examples") as advance:
    ...     advance(2)
    """

    def advance(steps: int = 1, note: str = "") -> None:
        pass

    yield advance
