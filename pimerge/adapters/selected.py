"""The experts that a stage combines, and their target: those given, or those that a ranking selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.ranking_document import Ranking
    from pimerge.checkpoints.base import Base
    from pimerge.tasks.task import Task


@dataclass(frozen=True)
class Selection:
    """Experts to merge or tune, and the target that they are for.

    Attributes:
        experts: at the strength that the ranking found for them, those that were named at their own; empty if the
            ranking expects none to help.
        target: the target's own expert; None if it has none or none is known.
        task_folder: the folder of the target's task.json; None if no target is known, or its task is open already.
        scores: of the experts, from the ranking; None for an expert that it does not have. ``gains``: that it expects.
        task: the target's task, where it was given open.
    """

    experts: list[Expert]
    target: Expert | None
    task_folder: Path | None
    scores: list[float | None]
    gains: list[float | None]
    task: Task | None = None

    @property
    def task_source(self) -> Path | Task | None:
        """What :func:`pimerge.tasks.task.open_task` opens; None if no target is known."""
        return self.task or self.task_folder


def open_all(references: Sequence[str | Path | Expert], base: str | None, *, convert: bool = False) -> list[Expert]:
    """Open several experts, with the problems of all of them at once; those that are open already stay.

    Args:
        convert: accept DoRA, PiSSA and OLoRA.
    """
    from pimerge.adapters.expert import Expert, open_expert

    problems = Problems()
    experts = []
    for reference in references:
        if isinstance(reference, Expert):
            experts.append(reference)
            continue
        own = Problems()
        with own.collected():
            experts.append(open_expert(reference, base, convert=convert))
        for problem in own.found:
            problems.extend([problem], "" if str(reference) in problem.message else f"'{reference}': ")
    problems.raise_any("some experts cannot be opened")
    return experts


def select(
    references: Sequence[str | Path | Expert] | None,
    ranked: Path | Ranking,
    target: str | Path | Expert | Task | None,
    base: str | None,
    *,
    needed: bool = True,
    convert: bool = False,
) -> Selection:
    """The experts given, else those that the ranking selected; and the target given, else the ranking's.

    Args:
        ranked: the ranking, or its file.
        target: a reference to an expert or a task, or one that is open already.
        needed: whether there must be experts or a ranking.
        convert: accept experts that have to be converted with the base's weights.
    """
    from pimerge.adapters.ranking_document import Ranking, open_ranked, read_ranking
    from pimerge.tasks.task import Task

    ranking = ranked if isinstance(ranked, Ranking) else None
    ranking_path = ranked.path if isinstance(ranked, Ranking) else ranked
    if ranking is None and (ranking_path.is_file() or (not references and needed)):
        ranking = read_ranking(ranking_path)
    if target is None and ranking is not None:
        target = ranking.task
    task = target if isinstance(target, Task) else None
    own, folder = _target(target, ranking, ranking_path, base, convert=convert)
    if references:
        experts = open_all(references, base, convert=convert)
        known = {c.sha256: c for c in ranking.candidates} if ranking else {}
        found = [known.get(expert.sha256) for expert in experts]
        scores, gains = ([getattr(candidate, name, None) for candidate in found] for name in ("score", "gain"))
        return Selection(experts, own, folder, scores, gains, task)
    if ranking is None or not needed:
        return Selection([], own, folder, [], [], task)
    if target is not None and not _is_ranked(ranking, own, task or folder):
        raise PimergeError(
            f"'{ranking_path}' ranks experts for '{ranking.target.name}', not for '{_name(target)}' as it is now",
            f"run 'pimerge rank --target {_name(target)}' first, or name the experts",
        )
    problems = Problems()
    experts = []
    for candidate in ranking.chosen():
        with problems.collected():
            experts.append(open_ranked(candidate, ranking_path, base))
    problems.raise_any("some experts of the ranking cannot be opened")
    candidates = ranking.chosen()
    return Selection(experts, own, folder, [c.score for c in candidates], [c.gain for c in candidates], task)


def from_pool(chosen: Selection, ranked: Path | Ranking, base: str | None) -> Expert | None:
    """An expert whose form a fresh one can take: the first that was ranked for a target without an expert.

    Returns:
        None where the target or the experts chosen show the form, or nothing was ranked for this target.
    """
    from pimerge.adapters.ranking_document import Ranking, open_ranked, read_ranking

    if chosen.target is not None or chosen.experts or not (isinstance(ranked, Ranking) or ranked.is_file()):
        return None
    ranking = ranked if isinstance(ranked, Ranking) else read_ranking(ranked)
    if not ranking.candidates or not _is_ranked(ranking, None, chosen.task_source):
        return None
    return open_ranked(ranking.candidates[0], ranking.path, base)


def _name(target: str | Path | Expert | Task) -> str:
    return str(target) if isinstance(target, str | Path) else target.name


def _is_ranked(ranking: Ranking, own: Expert | None, task: Path | Task | None) -> bool:
    """Whether a ranking is for a target: the same expert, or the same task where that has none."""
    from pimerge.tasks.task import open_task

    if own is not None:
        return own.sha256 == ranking.target.sha256
    return not ranking.target.expert and task is not None and open_task(task).sha256() == ranking.target.sha256


def _target(
    target: str | Path | Expert | Task | None,
    ranking: Ranking | None,
    ranking_path: Path,
    base: str | None,
    *,
    convert: bool,
) -> tuple[Expert | None, Path | None]:
    """The target's own expert and its task's folder, each None where there is none."""
    from pimerge.adapters.expert import Expert, open_expert
    from pimerge.adapters.expert_files import CONFIG
    from pimerge.tasks.task import Task

    if target is None:
        return (None, None) if ranking is None else _ranked_target(ranking, ranking_path, base)
    if isinstance(target, Expert | Task):
        return (target, target.path) if isinstance(target, Expert) else (None, None)
    if ranking is not None and target == ranking.target.name and not Path(target).is_dir():
        return _ranked_target(ranking, ranking_path, base)
    path = Path(target)
    path = path.parent if path.is_file() and path.name == "task.json" else path
    if path.is_dir() and not (path / CONFIG).is_file():
        if not (path / "task.json").is_file():
            raise PimergeError(f"'{path}' is neither an expert nor a task", "expected adapter_config.json or task.json")
        return None, path
    own = open_expert(target if not path.is_dir() else path, base, convert=convert)
    return own, own.path


def _ranked_target(ranking: Ranking, ranking_path: Path, base: str | None) -> tuple[Expert | None, Path]:
    """The ranking's target: its expert and folder; an error if it has changed since it was ranked."""
    from pimerge.adapters.ranking_document import open_ranked

    if ranking.target.expert:
        own = open_ranked(ranking.target, ranking_path, base)
        return own, own.path
    folder = ranking_path.parent / ranking.target.path
    if not _is_ranked(ranking, None, folder):
        raise PimergeError(
            f"the task '{folder}' or its data has changed since '{ranking_path}' was written",
            f"run 'pimerge rank --target {folder}' again",
        )
    return None, folder


def base_of(experts: Sequence[Expert], target: Expert | None, base: str | None) -> Base:
    """The base given, else that of the target's expert, else that of the experts."""
    from pimerge.checkpoints.base import find_base

    if base is not None:
        name, _, revision = base.partition("@")
        return find_base(name, revision or None, Path.cwd())
    first = target or next(iter(experts), None)
    if first is None:
        raise PimergeError("the base model is not known", "pass --base FOLDER_OR_HUB_ID")
    return first.base


def pool_members(references: list[str]) -> list[str | Path]:
    """The experts of every pool, in order; a Hub id stands for itself."""
    from pimerge.adapters.expert_files import find_experts
    from pimerge.adapters.hub import is_hub_reference

    found: list[str | Path] = []
    for reference in references:
        if not Path(reference).is_dir() and is_hub_reference(reference):
            found.append(reference)
        else:
            found += find_experts(Path(reference))
    return found
