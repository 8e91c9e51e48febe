"""How long work reports its progress without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[..., None]
"""``advance(steps=1, note="")``: so many more steps are done; the note is shown beside the bar."""

Track: TypeAlias = Callable[[str, int, str], AbstractContextManager[Advance]]
"""``track(description, total, unit)`` opens a progress report and gives its ``advance``."""


@contextmanager
def silent(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Report nothing: the default of every stage.

    >>> with silent("Fisher", 2, "examples") as advance:
    ...     advance(2)
    """

    def advance(steps: int = 1, note: str = "") -> None:
        pass

    yield advance
