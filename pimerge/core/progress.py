"""How a stage reports progress and remarks without knowing who shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[..., None]
"""``advance(steps=1, note="")`` reports that many more steps as done; the note is shown beside the bar."""

Track: TypeAlias = Callable[[str, int, str], AbstractContextManager[Advance]]
"""``track(description, total, unit)`` opens a progress report and yields its ``advance``."""


Note: TypeAlias = Callable[[str], None]
"""``note(message)`` tells the user one sentence that is worth knowing and is not a result."""


def unheard(message: str) -> None:
    """Drop a remark: the default ``note`` of every stage."""


@contextmanager
def silent(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Report nothing: the default ``track`` of every stage.

    >>> with silent("Fisher", 2, "examples") as advance:
    ...     advance(2)
    """

    def advance(steps: int = 1, note: str = "") -> None:
        pass

    yield advance
