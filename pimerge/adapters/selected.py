"""Choose the experts that a stage combines, and their target: given by the user or selected by a ranking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import CONFIG, TASK
from pimerge.adapters.hub import is_hub_reference
from pimerge.adapters.pool import find_experts
from pimerge.adapters.ranking_document import Ranking, open_ranked, read_ranking
from pimerge.adapters.shared_modules import with_one_prefix
from pimerge.adapters.source import adapter_files
from pimerge.checkpoints.base import Base, given_base
from pimerge.checkpoints.unique_names import unique_names
from pimerge.core.errors import PimergeError, Problems
from pimerge.tasks.task import Task, open_task


@dataclass(frozen=True)
class Selection:
    """The experts to merge or tune, and their target.

    Attributes:
        experts: experts of the ranking at the strength that it found, given experts at strength 1; empty if the
            ranking expects none to help.
        target: the target's own expert; None if there is none.
        task_folder: the folder of the target's task.json; None if no target is known or its task is already open.
        scores: score of each expert in the ranking; None for an expert that is not ranked.
        gains: expected gain of each expert; None where it is unknown.
        task: the target's task, if it was given as an object.
    """

    experts: list[Expert]
    target: Expert | None
    task_folder: Path | None
    scores: list[float | None]
    gains: list[float | None]
    task: Task | None = None

    @property
    def task_source(self) -> Path | Task | None:
        """The argument for :func:`pimerge.tasks.task.open_task`; None if no target is known."""
        return self.task or self.task_folder


def listed(experts: str | Path | Expert | Iterable[str | Path | Expert] | None) -> list[str | Path | Expert] | None:
    """Return the given experts as a list; a single one is not a sequence of characters, and none at all is refused.

    >>> listed("experts/a"), listed(None)
    (['experts/a'], None)
    """
    if experts is None:
        return None
    if not isinstance(experts, str | Path | Expert | Iterable):
        raise PimergeError(f"experts is {experts!r}", "expected folders, Hub ids or open experts")
    found = [experts] if isinstance(experts, str | Path | Expert) else list(experts)
    if not found:
        raise PimergeError("the list of experts is empty", "name at least one expert, or leave the argument out")
    return found


def open_all(
    references: Sequence[str | Path | Expert],
    base: str | None,
    *,
    convert: bool = False,
    expert_order: str | None = None,
    config: Path | None = None,
) -> list[Expert]:
    """Open several experts and raise the problems of all of them at once; open experts are returned unchanged.

    Args:
        convert: accept experts that have to be converted with the base's weights (DoRA, PiSSA, OLoRA).
        expert_order: how the updates of a mixture's experts are stored, where a config does not say.
        config: the ``adapter_config.json`` of those that are single files; None for the one beside each.
    """
    problems = Problems()
    experts = []
    for reference in references:
        if isinstance(reference, Expert):
            experts.append(reference)
            continue
        own = Problems()
        with own.collected():
            opened = open_expert(reference, base, convert=convert, expert_order=expert_order, config=config)
            experts.append(opened)
        for problem in own.found:
            problems.extend([problem], "" if str(reference) in problem.message else f"'{reference}': ")
    problems.raise_any("some experts cannot be opened")
    return distinguished(with_one_prefix(experts))


def distinguished(experts: Sequence[Expert], taken: Mapping[str, Path] | None = None) -> list[Expert]:
    """Give experts in folders of one name the names by which they are told apart; all others keep theirs.

    Args:
        taken: names that others have already → their folders.
    """
    names = unique_names(experts, taken)
    return [
        expert if expert.name == name else replace(expert, label=name)
        for expert, name in zip(experts, names, strict=True)
    ]


def select(
    references: Sequence[str | Path | Expert] | None,
    ranked: Path | Ranking,
    target: str | Path | Expert | Task | None,
    base: str | None,
    *,
    needed: bool = True,
    convert: bool = False,
) -> Selection:
    """Choose the given experts or else those that the ranking selected, and the given target or else the ranking's.

    Args:
        ranked: the ranking, or its file.
        target: a reference to an expert or a task, or the object.
        needed: whether to require experts or a ranking.
        convert: accept experts that have to be converted with the base's weights.
    """
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
        if own is not None:
            own, *experts = distinguished(with_one_prefix([own, *experts]))
        found = [known.get(expert.sha256) for expert in experts]
        scores, gains = ([getattr(candidate, name, None) for candidate in found] for name in ("score", "gain"))
        return Selection(experts, own, folder, scores, gains, task)
    if ranking is None or not needed:
        return Selection([], own, folder, [], [], task)
    if target is not None and not _is_ranked(ranking, own, task or folder):
        raise PimergeError(
            f"'{ranking_path}' ranks experts for '{ranking.target.name}', not for '{_name(target)}' in its present "
            "state",
            f"run 'pimerge rank --target {_name(target)}' first, or name the experts",
        )
    problems, candidates = Problems(), ranking.chosen()
    experts = []
    for candidate in candidates:
        with problems.collected():
            experts.append(open_ranked(candidate, ranking_path, base))
    problems.raise_any("some experts of the ranking cannot be opened")
    if own is not None:
        own, *experts = with_one_prefix([own, *experts])
    else:
        experts = with_one_prefix(experts)
    return Selection(experts, own, folder, [c.score for c in candidates], [c.gain for c in candidates], task)


def from_pool(chosen: Selection, ranked: Path | Ranking, base: str | None) -> Expert | None:
    """Find an expert of the pool as a template for a fresh one: the best-ranked for a target without an expert.

    Returns:
        None if the target or the chosen experts are a template, or nothing was ranked for this target.
    """
    if chosen.target is not None or chosen.experts or not (isinstance(ranked, Ranking) or ranked.is_file()):
        return None
    ranking = ranked if isinstance(ranked, Ranking) else read_ranking(ranked)
    if not ranking.candidates or not _is_ranked(ranking, None, chosen.task_source):
        return None
    return open_ranked(ranking.candidates[0], ranking.path, base)


def _name(target: str | Path | Expert | Task) -> str:
    return str(target) if isinstance(target, str | Path) else target.name


def _is_ranked(ranking: Ranking, own: Expert | None, task: Path | Task | None) -> bool:
    """Whether a ranking is for a target: for the same expert, or for the same task if the target has no expert."""
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
    """The target's own expert and its task's folder, each None if there is none."""
    if target is None:
        return (None, None) if ranking is None else _ranked_target(ranking, ranking_path, base)
    if isinstance(target, Expert | Task):
        return (target, target.folder) if isinstance(target, Expert) else (None, None)
    if ranking is not None and target == ranking.target.name and not Path(target).is_dir():
        return _ranked_target(ranking, ranking_path, base)
    path = Path(target)
    path = path.parent if path.is_file() and path.name == TASK else path
    if path.is_dir() and not (path / CONFIG).is_file() and not adapter_files(path):
        if not (path / TASK).is_file():
            raise PimergeError(f"'{path}' is neither an expert nor a task", "expected adapter_config.json or task.json")
        return None, path
    own = open_expert(target if not path.is_dir() else path, base, convert=convert)
    return own, own.folder


def _ranked_target(ranking: Ranking, ranking_path: Path, base: str | None) -> tuple[Expert | None, Path]:
    """The target of a ranking; a target that has changed since is refused."""
    if ranking.target.expert:
        own = open_ranked(ranking.target, ranking_path, base)
        return own, own.folder
    folder = ranking_path.parent / ranking.target.path
    if not _is_ranked(ranking, None, folder):
        raise PimergeError(
            f"the task '{folder}' or its data has changed since '{ranking_path}' was written",
            f"run 'pimerge rank --target {folder}' again",
        )
    return None, folder


def base_of(experts: Sequence[Expert], target: Expert | None, base: str | None) -> Base:
    """The given base, or else the base of the target's expert or of the first expert."""
    if base is not None:
        return given_base(base)
    first = target or next(iter(experts), None)
    if first is None:
        raise PimergeError("the base model is not known", "pass --base FOLDER_OR_HUB_ID")
    return first.base


def pool_members(references: list[str]) -> list[str | Path]:
    """The experts of every pool, in order; a Hub id is an expert itself."""
    found: list[str | Path] = []
    for reference in references:
        if not Path(reference).is_dir() and (is_hub_reference(reference) or Path(reference).is_file()):
            found.append(reference)
        else:
            found += find_experts(Path(reference))
    return found
