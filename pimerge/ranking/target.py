"""Input of ``pimerge rank``: its options, the target and the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.adapters.ranking_document import Target
from pimerge.checkpoints.base import Base, given_base
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import relative_to
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.embedding.store import Store, unknown_target
from pimerge.ranking.selection import SelectionRule
from pimerge.tasks.task import TASK_FILE, Task, TaskSource, open_task

AUTO = "auto"
TARGETS = "targets"


@dataclass(frozen=True)
class RankRequest:
    """Options of :func:`pimerge.ranking.rank.rank`, under the same names."""

    store: str | Path = "embeddings.json"
    k: int | None = 2
    measure: str = AUTO
    shots: int | None = None
    up_to_shots: bool = False
    examples: int = 500
    seed: int = 0
    gate: bool = True
    train_target: bool = False
    base: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    force: bool = False
    track: Track = silent
    note: Note = unheard
    warn: Note = unheard

    @property
    def rule(self) -> SelectionRule:
        """How many experts are selected, and whether they must be expected to help."""
        return SelectionRule(self.k, self.gate)


@dataclass(frozen=True)
class RankTarget:
    """The target of a ranking.

    Attributes:
        name: its name in the store if the store holds it, otherwise its own name.
        expert: the target's own expert, if it has one.
        folder: folder of the expert or of the task; for rows in memory the name of the task.
        stored: whether the store holds the expert.
        given: the target's task, if it was given as an object.
        up_to_shots: whether a class with fewer examples than shots gives all of them.
    """

    name: str
    expert: Expert | None
    folder: Path
    stored: bool
    given: Task | None = None
    up_to_shots: bool = False

    def task(self) -> Task:
        """Open the target's task."""
        return replace(self.given or open_task(self.folder), up_to_shots=self.up_to_shots)

    def reference(self) -> Target:
        """Return the reference by which the ranking names the target."""
        sha256 = self.expert.sha256 if self.expert else self.task().sha256()
        path = relative_to(self.folder, Path())
        return Target(name=self.name, path=path, sha256=sha256, expert=self.expert is not None)


def find_target(target: Expert | TaskSource, store: Store, base: str | None) -> RankTarget:
    """Find a target: a name in the store, the folder of an expert or of a task, or an expert, a task or rows in memory.

    A task uses the expert that ``--train-target`` trained for it, as long as the task has not changed.

    Args:
        base: the base model, instead of the one that an expert outside the store names.
    """
    if isinstance(target, Expert):
        known = store.find(str(target.path))
        return RankTarget(known or target.name, target, target.path, stored=known is not None)
    if not isinstance(target, str | Path):
        task = open_task(target)
        return _of_task(task, store) or RankTarget(task.name, None, task.path, stored=False, given=task)
    known = store.find(str(target))
    if known is not None:
        return RankTarget(known, store.open(known), store.folder_of(known), stored=True)
    path = Path(target)
    folder = path.parent if path.is_file() and path.name == TASK_FILE else path
    if not folder.is_dir():
        raise unknown_target(str(target), store)
    if (folder / CONFIG).is_file():
        expert = open_expert(folder, base)
        return RankTarget(expert.name, expert, folder, stored=False)
    task = open_task(folder)
    return _of_task(task, store) or RankTarget(task.name, None, folder, stored=False)


def _of_task(task: Task, store: Store) -> RankTarget | None:
    """Return the target with the expert that ``--train-target`` trained for a task, if the store holds it."""
    trained = folder_for(store, task.name)
    known = store.find(str(trained))
    if known is not None and trained.is_dir() and store.experts[known].task_sha256 == task.sha256():
        return RankTarget(known, store.open(known), trained, stored=True, given=task)
    return None


def folder_for(store: Store, task: str) -> Path:
    """Return the folder of the expert that ``--train-target`` trains for a task."""
    return store.path.parent / TARGETS / task


def pool_base(store: Store, target: RankTarget, reference: str | None) -> Base:
    """Return the given base, otherwise the base of the target's expert, otherwise that of the store's experts."""
    if reference is not None:
        return given_base(reference)
    if target.expert is not None:
        return target.expert.base
    count = len({entry.base for entry in store.experts.values()})
    if count > 1:
        raise PimergeError(
            f"the experts of '{store.path}' have {count} different bases, and the target is only a task",
            "pass the target's base: --base FOLDER_OR_HUB_ID",
        )
    problems = Problems()
    for name in store.experts:
        with problems.collected():
            return store.open(name).base
    problems.raise_any(f"no expert of '{store.path}' can be opened")
    raise AssertionError("unreachable: a store has experts")


def names_on(store: Store, target: RankTarget, base: Base) -> tuple[list[str], dict[str, str]]:
    """Return the names of the store's experts on a base without the target, and why the others are left out."""
    names, excluded = [], {}
    for name, entry in store.experts.items():
        if target.stored and name == target.name:
            continue
        if entry.base == base.identity:
            names.append(name)
        else:
            excluded[name] = f"its base is {store.base_name(name)}, another model than the target's {base.name}"
    return names, excluded


def open_all(store: Store, names: Sequence[str]) -> tuple[dict[str, Expert], dict[str, str]]:
    """Open experts of the store: name → expert, and name → why it cannot be opened."""
    experts, excluded = {}, {}
    for name in names:
        try:
            experts[name] = store.open(name)
        except PimergeError as error:
            error.raise_if_disk_fails()
            excluded[name] = error.problems[0].message
    return experts, excluded


def pool_of(store: Store, target: RankTarget, base: Base) -> tuple[dict[str, Expert], dict[str, str]]:
    """Open the store's experts on a base without the target: name → expert, and name → why it is left out."""
    names, others = names_on(store, target, base)
    experts, broken = open_all(store, names)
    return experts, others | broken
