"""What ``pimerge plot`` reads: the store, a ranking with its experts, the data of another plot, a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pimerge.adapters.selected import base_of, open_all, select
from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json
from pimerge.core.libraries import quiet_libraries
from pimerge.tasks.task import open_task

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.ranking_document import Candidate, Ranking
    from pimerge.adapters.writer import Coefficients
    from pimerge.embedding.store import Store
    from pimerge.evaluation.schema import ComparisonDocument
    from pimerge.reporting.figures._study import Study
    from pimerge.reporting.figures.path import Data as Paths


@dataclass(frozen=True)
class Sources:
    """The options of ``pimerge plot`` that say where something lies, by their names there."""

    store: Path
    ranking: Path
    path: Path
    comparison: Path
    tuned: Path
    target: str | None
    base: str | None


def source_of(figure: Any, sources: Sources, experts: Sequence[str]) -> Any:
    """What a figure needs, opened.

    Args:
        figure: a file of ``figures/``.
        experts: those that were named.

    Raises:
        PimergeError: if it is not there or does not fit, with the command that makes it.
    """
    return _NEEDS[figure.NEEDS].open(sources, experts)


def options_of(figure: Any) -> set[str]:
    """The options of ``pimerge plot`` that mean something to a figure, by their names there."""
    return {*figure.OPTIONS, *_NEEDS[figure.NEEDS].options}


def read_data(figure: Any, name: str, path: Path) -> BaseModel:
    """The data of a plot that was written before.

    Raises:
        PimergeError: if it is not there, or is the data of another plot.
    """
    document = read_json(path)
    own = document.get("figure") if isinstance(document, dict) else None
    if own != name:
        found = f"the data of the plot '{own}'" if isinstance(own, str) else "no data of a plot"
        raise PimergeError(f"'{path}' is {found}, not of '{name}'", f"'pimerge plot {name}' writes such a file")
    data: BaseModel = parse_document(figure.Data, path, f"run 'pimerge plot {name}' again")
    return data


def _store(sources: Sources, experts: Sequence[str]) -> Store:
    from pimerge.embedding.store import open_store

    return open_store(sources.store)


def _comparison(sources: Sources, experts: Sequence[str]) -> ComparisonDocument:
    from pimerge.evaluation.schema import read_comparison

    found = read_comparison(sources.comparison)
    if not found.lines:
        raise PimergeError(f"'{sources.comparison}' has no finished runs", "run the same 'pimerge compare' again")
    return found


def _paths(sources: Sources, experts: Sequence[str]) -> tuple[Ranking, Paths]:
    from pimerge.adapters.ranking_document import read_ranking
    from pimerge.core import plugins
    from pimerge.reporting.figures.path import Data

    if not sources.path.is_file():
        raise PimergeError(f"there is no '{sources.path}'", "run 'pimerge plot path' first, which writes it")
    paths = read_data(plugins.load("pimerge.reporting.figures", "path"), "path", sources.path)
    assert isinstance(paths, Data)
    return read_ranking(sources.ranking), paths


def _study(sources: Sources, experts: Sequence[str]) -> Study:
    """The target with its expert; and the experts that are named, else all that the ranking has."""
    from pimerge.adapters.compatibility import require_alike
    from pimerge.reporting.figures._study import Study

    quiet_libraries()
    target, folder = _target(sources)
    others = _experts(sources, experts, target)
    left_out = {}
    for expert in others:
        try:
            require_alike([target, expert])
        except PimergeError as error:
            left_out[expert.name] = error.problems[0].message
    kept = [expert for expert in others if expert.name not in left_out]
    if not kept or (experts and left_out):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "there is none"
        raise PimergeError(f"no sum of '{target.name}' and the other experts can be had ({reasons})", "name others")
    return Study(target, open_task(folder), base_of([], target, sources.base), kept, left_out)


def _tuned(sources: Sources, experts: Sequence[str]) -> tuple[Study, Coefficients]:
    """The tuned expert with those that it is made of, and their weights."""
    from pimerge.adapters.expert import open_expert
    from pimerge.adapters.ranking_document import Reference, open_ranked
    from pimerge.adapters.writer import COEFFICIENTS_FILE, Coefficients
    from pimerge.reporting.figures._study import Study

    quiet_libraries()
    if not sources.tuned.is_dir():
        raise PimergeError(f"there is no '{sources.tuned}'", "run 'pimerge tune' first")
    tuned, file = open_expert(sources.tuned, sources.base), sources.tuned / COEFFICIENTS_FILE
    if not file.is_file():
        raise PimergeError(
            f"'{sources.tuned}' has no {COEFFICIENTS_FILE}: it is composed of no experts",
            "run 'pimerge tune', or name another folder with --tuned",
        )
    content = parse_document(Coefficients, file)
    problems, members = Problems(), []
    for path, sha256, scale in zip(content.experts, content.sha256, content.scales, strict=True):
        with problems.collected():
            member = open_ranked(Reference(name=path, path=path, sha256=sha256), file, sources.base)
            members.append(member.with_strength(scale))
    problems.raise_any(f"some experts of '{file}' cannot be opened")
    return Study(tuned, open_task(tuned.path), base_of([], tuned, sources.base), members), content


def _target(sources: Sources) -> tuple[Expert, Path]:
    if sources.target is None and not sources.ranking.is_file():
        raise PimergeError(
            f"the target is not known: there is no ranking '{sources.ranking}'",
            "run 'pimerge rank --target NAME' first, or pass --target FOLDER and name the experts",
        )
    chosen = select(None, sources.ranking, sources.target, sources.base, needed=False)
    if chosen.target is None:
        raise PimergeError(
            f"the target '{chosen.task_folder}' has no expert of its own, where a path would start",
            "train one: pimerge rank --train-target --measure fisher --force "
            f"--target {chosen.task_folder}, or pimerge tune --method scratch --target {chosen.task_folder}",
        )
    assert chosen.task_folder is not None
    return chosen.target, chosen.task_folder


def _experts(sources: Sources, names: Sequence[str], target: Expert) -> list[Expert]:
    """At full strength, whatever the ranking advises."""
    from pimerge.adapters.ranking_document import Reference, open_ranked, read_ranking

    candidates: dict[str, Candidate] = {}
    if not names or sources.ranking.is_file():
        candidates = {candidate.name: candidate for candidate in read_ranking(sources.ranking).candidates}
    found: list[Expert] = []
    problems = Problems()
    for name in names or candidates:
        with problems.collected():
            if name == target.name:
                continue
            if name in candidates and not (names and Path(name).is_dir()):
                known = candidates[name]
                plain = Reference(name=known.name, path=known.path, sha256=known.sha256)
                found.append(open_ranked(plain, sources.ranking, sources.base))
            else:
                found += open_all([name], sources.base)
    problems.raise_any("some experts cannot be opened")
    return [expert for expert in found if expert.sha256 != target.sha256]


@dataclass(frozen=True)
class _Need:
    """How something is opened that figures need, and the options that say where it lies."""

    open: Callable[[Sources, Sequence[str]], Any]
    options: tuple[str, ...]


_NEEDS = {
    "store": _Need(_store, ("store",)),
    "tuned": _Need(_tuned, ("tuned", "base", "device", "dtype")),
    "study": _Need(_study, ("ranking", "target", "base", "device", "dtype")),
    "comparison": _Need(_comparison, ("comparison",)),
    "path": _Need(_paths, ("ranking", "path")),
}
