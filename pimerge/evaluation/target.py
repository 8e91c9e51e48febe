"""Targets of evaluate and compare: a path, rows in memory, a task or an expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking
from pimerge.adapters.selected import select
from pimerge.tasks.task import Task, TaskSource, open_task

TargetSource: TypeAlias = "Expert | TaskSource"
"""An expert's or a task's folder, a Hub id, the name of the ranking's target, an expert, a task, or rows in memory."""


def open_target(
    target: TargetSource | None, ranking: str | Path | Ranking, base: str | None
) -> tuple[Expert | None, Task | None]:
    """Open the target's own expert and its task, each None if there is none.

    Args:
        target: the target; None uses the ranking's target.
    """
    if isinstance(target, Expert):
        return target, open_task(target.folder)
    if target is not None and not isinstance(target, str | Path):
        return None, open_task(target)
    ranked = ranking if isinstance(ranking, Ranking) else Path(ranking)
    chosen = select(None, ranked, None if target is None else str(target), base, needed=False)
    return chosen.target, open_task(chosen.task_source) if chosen.task_source else None


def task_beside(folders: Sequence[Path]) -> Task | None:
    """Return the task of the first folder that holds one."""
    return next((open_task(folder) for folder in folders if (folder / "task.json").is_file()), None)
