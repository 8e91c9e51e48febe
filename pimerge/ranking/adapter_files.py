"""Rank files of adapters, in any format, by the cosine of their updates ΔW."""

from __future__ import annotations

from pathlib import Path

from pimerge.adapters.compatibility import require_alike, require_finite
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.adapters.shared_modules import with_one_prefix
from pimerge.adapters.source import adapter_files
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import relative_to
from pimerge.embedding.store_view import StoreView
from pimerge.ranking.measure import BY_UPDATES, MEASURES, Measure, Needs
from pimerge.ranking.selection import best_first, candidate_by_cosine, ranking_of, widest_gap
from pimerge.ranking.target import AUTO, RankRequest


def rank_adapter_files(path: Path, pool: Path, request: RankRequest) -> Ranking:
    """Rank the other adapters of a folder by the similarity of their ΔW to the target's.

    No base is needed, and no mean is subtracted. A file that cannot be summed with the target is not comparable.

    Args:
        path: the target's file.
        pool: the folder.
    """
    measure = _measure(request)
    target = open_expert(path)
    require_finite([target])
    others = [each for each in adapter_files(pool) if each.resolve() != path.resolve()]
    if not others:
        raise PimergeError(f"'{pool}' holds no other adapter than the target", "put the files to be ranked there")
    known, excluded = [], {}
    for each in others:
        try:
            expert = with_one_prefix([target, open_expert(each)])[1]
            require_alike([target, expert])
            require_finite([expert])
            known.append(expert)
        except PimergeError as error:
            error.raise_if_disk_fails()
            excluded[each.stem] = error.problems[0].message
    candidates = best_first(_candidates(measure, target, known)) if known else []
    count = request.k if request.k is not None else widest_gap([candidate.score for candidate in candidates])
    reference = Target(name=target.name, path=relative_to(path, Path()), sha256=target.sha256)
    what = f"comparable adapters by '{measure.name}'"
    return ranking_of(reference, measure, candidates, excluded, candidates, count, what, [])


def _measure(request: RankRequest) -> Measure:
    """The measure of a request, which must compare ΔW by the files alone."""
    measure = MEASURES.load(BY_UPDATES if request.measure == AUTO else request.measure)
    problems = Problems()
    if measure.needs is not Needs.EXPERTS or not measure.needs_update:
        problems.add(
            f"'{measure.name}' needs the adapter's base or its factors' init, which a file does not name",
            f"use --measure {BY_UPDATES}",
        )
    given = {"--shots": request.shots is not None, "--train-target": request.train_target, "--base": request.base}
    for option in [option for option, is_given in given.items() if is_given]:
        problems.add(f"{option} does not apply to files of adapters", "leave it out")
    problems.raise_any("these adapters cannot be ranked")
    return measure


def _candidates(measure: Measure, target: Expert, experts: list[Expert]) -> list[Candidate]:
    found = measure.similarity([StoreView(target), *map(StoreView, experts)], len(experts), [], False)
    return [
        candidate_by_cosine(expert.name, expert.path, expert.sha256, float(score), float(error))
        for expert, score, error in zip(experts, found.scores(), found.errors(), strict=True)
    ]
