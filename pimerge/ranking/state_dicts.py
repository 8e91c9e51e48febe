"""Rank plain state dicts (``.safetensors`` files without a config) by the cosine of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.checkpoints.adapter_keys import is_adapter_file
from pimerge.checkpoints.checkpoint import PICKLES, UNPICKLE
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.safetensors_file import TensorFile, open_tensors
from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.core.files import relative_to, sha256_file
from pimerge.ranking.adapter_files import rank_adapter_files
from pimerge.ranking.cosine import Similarity
from pimerge.ranking.measure import BY_FILES, MEASURES, Measure
from pimerge.ranking.selection import best_first, candidate_by_cosine, ranking_of, widest_gap
from pimerge.ranking.target import AUTO, RankRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class StateDict:
    """A file of tensors; see :func:`open_state_dict`."""

    file: TensorFile

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.path.name.removesuffix(SUFFIX)

    @cached_property
    def form(self) -> dict[str, tuple[int, ...]]:
        """Key → shape of every floating-point tensor."""
        return {key: entry.shape for key, entry in sorted(self.file.entries.items()) if entry.dtype in FLOATS}


def open_state_dict(path: Path) -> StateDict:
    """Open a state dict, and read and check its header."""
    if path.suffix in PICKLES:
        raise PimergeError(
            f"'{path}' is a pickle, which can run code when it is read; only {SUFFIX} files are read",
            UNPICKLE.format(path),
        )
    found = StateDict(open_tensors(path))
    if not found.form:
        raise PimergeError(f"'{path}' holds no floating-point tensor", "save it again")
    return found


def are_state_dicts(target: str, store: Path) -> bool:
    """Whether plain state dicts are to be ranked: the target is such a file, or the store is a folder."""
    return store.is_dir() or names_state_dict(target)


def names_state_dict(path: str) -> bool:
    """Whether a path is a plain state dict, or a pickle that might hold one."""
    return Path(path).suffix in (SUFFIX, *PICKLES) and Path(path).is_file()


def find_state_dict(name: str, folder: Path) -> Path:
    """Find a file of a pool by its name, with or without its suffix."""
    for path in (folder / name, folder / f"{name}{SUFFIX}"):
        if path.is_file():
            return path
    known = [path.name.removesuffix(SUFFIX) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    raise PimergeError(f"there is no state dict '{name}' in '{folder}'", nearest(name, known))


def ranked_state_dicts(target: str, request: RankRequest) -> Ranking | None:
    """Rank plain state dicts or files of adapters if the target or the store names them; otherwise return None."""
    path, pool = Path(target), Path(request.store)
    if not are_state_dicts(target, pool):
        return None
    pool = pool if pool.is_dir() else path.parent
    if is_adapter_file(path) or any(is_adapter_file(pool / name) for name in (target, f"{target}{SUFFIX}")):
        return rank_adapter_files(path if path.is_file() else find_state_dict(target, pool), pool, request)
    measure = MEASURES.load(BY_FILES if request.measure == AUTO else request.measure)
    problems = Problems()
    if measure.of_files is None:
        problems.add(
            f"'{measure.name}' needs experts with a config, and these are plain state dicts",
            f"use --measure {BY_FILES}",
        )
    given = {"--shots": request.shots is not None, "--train-target": request.train_target}
    for option in [option for option, is_given in given.items() if is_given]:
        problems.add(f"{option} does not apply to plain state dicts", "leave it out")
    base = None if request.base is None else Path(request.base)
    if base is not None and not names_state_dict(str(base)):
        problems.add(f"--base is '{base}'", f"expected the {SUFFIX} file that these state dicts were trained from")
    problems.raise_any("these state dicts cannot be ranked")
    if not path.is_file():
        path = find_state_dict(target, pool)
    return rank_state_dicts(path, pool, request.k, base, measure=measure)


def rank_state_dicts(
    path: Path, pool: Path, k: int | None, base: Path | None = None, *, measure: Measure | None = None
) -> Ranking:
    """Rank the other state dicts of a folder by the similarity of their numbers to the target's.

    Numbers trained from one start are similar whatever the task. If the start is known, the differences from it are
    compared instead.

    Args:
        path: the target's file.
        pool: the folder.
        k: number of state dicts to select; None selects those before the widest gap in scores.
        base: the file θ0 from which all were trained; then θ − θ0 is compared.
        measure: a measure that compares plain files; None uses the default.
    """
    measure = measure or MEASURES.load(BY_FILES)
    target = open_state_dict(path)
    start = open_state_dict(base) if base else None
    if start is not None and start.form != target.form:
        raise PimergeError(
            f"the base '{base}' does not fit '{path}': {_difference(target, start)}", "pass its own --base"
        )
    apart = {path.resolve(), *([base.resolve()] if base else [])}
    others = [
        each
        for each in sorted(pool.iterdir())
        if each.suffix in (SUFFIX, *PICKLES) and each.is_file() and each.resolve() not in apart
    ]
    if not others:
        raise PimergeError(
            f"'{pool}' holds no other state dict than the target", f"put the {SUFFIX} files that are to be ranked there"
        )
    origin = start.file if start else None
    own = _similarity(measure, target, [], origin)
    if not np.isfinite(own.own).all():
        raise PimergeError(
            f"{_unusable(own.tensors, own.own)} of the target '{path}' holds NaN or Inf", "the training diverged"
        )
    if start is not None and not own.own.any():
        raise PimergeError(f"the target '{path}' holds the same numbers as the base", "pass what it was trained from")
    candidates, excluded = [], {}
    for each in others:
        try:
            candidates.append(_candidate(measure, target, open_state_dict(each), origin))
        except PimergeError as error:
            error.raise_if_disk_fails()
            excluded[each.name.removesuffix(SUFFIX)] = error.problems[0].message
    candidates = best_first(candidates)
    count = k if k is not None else widest_gap([candidate.score for candidate in candidates])
    reference = Target(name=target.name, path=relative_to(path, Path()), sha256=sha256_file(path))
    what = f"comparable state dicts by '{measure.name}'"
    notes = [f"compared by their difference from '{base}'"] if base else []
    return ranking_of(reference, measure, candidates, excluded, candidates, count, what, notes)


def _similarity(
    measure: Measure, target: StateDict, others: Sequence[StateDict], start: TensorFile | None
) -> Similarity:
    assert measure.of_files is not None
    return measure.of_files([target.file, *(other.file for other in others)], list(target.form), start)


def _candidate(measure: Measure, target: StateDict, other: StateDict, start: TensorFile | None) -> Candidate:
    """Return the candidate of a state dict, which must have the target's tensors and differ from the start."""
    if other.form != target.form:
        raise PimergeError(_difference(target, other))
    similarity = _similarity(measure, target, [other], start)
    if not np.isfinite(similarity.norms).all():
        raise PimergeError(f"{_unusable(similarity.tensors, similarity.norms)} holds NaN or Inf")
    if start is not None and not similarity.norms.any():
        raise PimergeError("it holds the same numbers as the base")
    score, error = float(similarity.scores()[0]), float(similarity.errors()[0])
    return candidate_by_cosine(other.name, other.file.path, sha256_file(other.file.path), score, error)


def _unusable(tensors: list[str], squares: NDArray[np.float64]) -> str:
    """Return the first tensor whose norm is not finite, in quotes."""
    return f"'{tensors[int(np.flatnonzero(~np.isfinite(squares[0]))[0])]}'"


def _difference(target: StateDict, other: StateDict) -> str:
    """Describe the difference between the tensors of two files."""
    lacking, extra = sorted(target.form.keys() - other.form.keys()), sorted(other.form.keys() - target.form.keys())
    if lacking:
        return f"it has no '{lacking[0]}'" + (f" and {len(lacking) - 1} more of the target's" if lacking[1:] else "")
    if extra:
        return (
            f"it has '{extra[0]}'" + (f" and {len(extra) - 1} more" if extra[1:] else "") + ", which the target lacks"
        )
    key = next(key for key, shape in target.form.items() if other.form[key] != shape)
    return f"'{key}' is {other.form[key]}, the target's {target.form[key]}"
