"""Tuning on open experts, and a session whose base keeps what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.base import Base
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.models.heads import initialise_head
from pimerge.tasks.task import Task
from pimerge.tuning.method import open_tune_method
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import TuneInputs, run_tuning
from pimerge.tuning.session import TuneResult, TuningSession


def tune(
    method: str,
    task: Task,
    base: Base,
    experts: Sequence[Expert],
    target: Expert | None,
    output: Path,
    options: TrainingOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
    **inputs: Any,
) -> TuneResult:
    """Tune on open experts, with scores and gains as given; ``pimerge.tune`` takes them from a ranking."""
    given = TuneInputs(
        method=open_tune_method(method, settings),
        task=task,
        base=base,
        experts=experts,
        target=target,
        options=options,
        **inputs,
    )
    return run_tuning(given, output, force=force, track=track, note=note)


@contextmanager
def unrestored(session: TuningSession, seed: int) -> Iterator[ExitStack]:
    """In place of ``TuningSession.restored``: what was trained stays in the base, to be looked at."""
    initialise_head(session.loaded, seed)
    yield ExitStack()
