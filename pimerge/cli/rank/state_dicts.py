"""``pimerge rank`` of plain state dicts, which need no store: the folder of their files stands for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.core.errors import Problems
from pimerge.ranking.target import AUTO, RankRequest

if TYPE_CHECKING:
    from pimerge.adapters.ranking_document import Ranking


def ranked_state_dicts(target: str, request: RankRequest, folder: Path) -> Ranking | None:
    """The ranking, if the target or ``--store`` says that plain state dicts are meant; else None.

    Args:
        folder: where the ranking will lie.

    Raises:
        PimergeError: if an option does not go with them, or a file has a problem.
    """
    from pimerge.ranking.state_dicts import MEASURE, PICKLES, SUFFIX, find_state_dict, rank_state_dicts

    path, pool = Path(target), request.store
    if not pool.is_dir():
        if path.suffix not in (SUFFIX, *PICKLES) or not path.is_file():
            return None
        pool = path.parent
    problems = Problems()
    if request.measure not in (AUTO, MEASURE):
        problems.add(
            f"'{request.measure}' needs experts with a config, and these are plain state dicts",
            f"take --measure {MEASURE}",
        )
    given = {"--shots": request.shots is not None, "--train-target": request.train_target}
    for option in [option for option, is_given in given.items() if is_given]:
        problems.add(f"{option} means nothing to plain state dicts", "leave it out")
    base = None if request.base is None else Path(request.base)
    if base is not None and not (base.suffix in (SUFFIX, *PICKLES) and base.is_file()):
        problems.add(f"--base is '{base}'", f"expected the {SUFFIX} file that these state dicts were trained from")
    problems.raise_any("these state dicts cannot be ranked")
    if not path.is_file():
        path = find_state_dict(target, pool)
    return rank_state_dicts(path, pool, request.k, folder, base)
