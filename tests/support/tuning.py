"""A tuning session whose base keeps what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pimerge.models.heads import initialise_head
from pimerge.tuning.session import TuningSession


@contextmanager
def unrestored(session: TuningSession, seed: int) -> Iterator[ExitStack]:
    """In place of ``TuningSession.restored``: what was trained stays in the base, to be looked at."""
    initialise_head(session.loaded, seed)
    yield ExitStack()
