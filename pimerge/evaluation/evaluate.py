"""Score experts on a target's test split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking
from pimerge.adapters.selected import base_of, distinguished, open_all
from pimerge.checkpoints.checkpoint import is_checkpoint
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.evaluation.scoring import Score, score_checkpoint, score_experts
from pimerge.evaluation.target import TargetSource, open_target, task_beside
from pimerge.merging.merged import Merged
from pimerge.tasks.task import Task
from pimerge.tuning.ensemble import Ensemble, is_ensemble, open_ensemble
from pimerge.tuning.session import TuneResult

if TYPE_CHECKING:
    from pimerge.tasks.inference import SplitRows

DEFAULT_OUTPUTS = ("tuned", "merged")
Scorable: TypeAlias = "str | Path | Expert | Ensemble | TuneResult | Merged"
"""An expert or ensemble, its path or Hub id, the folder of a full checkpoint, or the result of tune or merge."""


@dataclass(frozen=True)
class Evaluation:
    """Scores on the test split of a target.

    Attributes:
        target: the name of the target.
        task: the target's task.
        scores: the bare base first, if it can answer, then the experts in the order given, then full checkpoints.
    """

    target: str
    task: Task
    scores: list[Score]

    def __iter__(self) -> Iterator[Score]:
        """Yield the scores in their order."""
        return iter(self.scores)

    def __getitem__(self, name: str) -> Score:
        """Return the score of an expert; ``(base)`` is the bare base."""
        found = {score.name: score for score in self.scores}
        if name not in found:
            raise KeyError(f"no score of '{name}'; there are scores of {', '.join(found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that ``pimerge eval --json`` prints."""
        return {"target": self.target, "split": "test", "scores": [asdict(score) for score in self.scores]}


@checked_arguments()
def evaluate(
    experts: Scorable | Sequence[Scorable] | None = None,
    *,
    target: TargetSource | None = None,
    test: SplitRows | None = None,
    ranking: str | Path | Ranking = "ranking.json",
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    track: Track = silent,
    note: Note = unheard,
) -> Evaluation:
    """Score experts and the bare base on the target's test split, each with a 95 % interval.

    The bare base answers with its own head if that is for the target's classes, otherwise with the head of the target's
    expert. Without either it has no score.

    Args:
        experts: experts, ensembles or full checkpoints (open, or their paths or Hub ids), and results of
            ``pimerge.tune`` and ``pimerge.merge``. By default the folders ``tuned`` and ``merged``, as far as they
            exist.
        target: an expert's or a task's folder, an expert, a task, a ``datasets.Dataset`` or a list of dicts. By default
            the ranking's target, otherwise the task of the first expert that has one.
        test: rows of the test split, if ``target`` is rows.
        ranking: the ranking, or its file, that names the target.
        base: a base model's folder or Hub id, in place of the one that the experts name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``auto`` (bfloat16 on a GPU, otherwise float32), ``float32``, ``bfloat16`` or ``float64``.
        track: shows progress.
        note: receives remarks, one sentence at a time.

    Returns:
        accuracy, loss and the task's metrics of each, with 95 % intervals.

    Example::

        scores = pimerge.evaluate(["tuned", "merged"], target="experts/X")
        scores["tuned"].accuracy, scores["tuned"].accuracy_low, scores["tuned"].accuracy_high
    """
    if experts is None:
        experts = [name for name in DEFAULT_OUTPUTS if Path(name).is_dir()]
    several = experts if isinstance(experts, Sequence) and not isinstance(experts, str) else [experts]
    given = [_written(each) for each in several]
    checkpoints = [Path(each) for each in given if isinstance(each, str | Path) and _is_checkpoint(each)]
    rows = _opened([each for each in given if not _is_checkpoint(each)], base)
    opened = [expert for row in rows for expert in (row.experts if isinstance(row, Ensemble) else [row])]
    if test is not None:
        target = _with_test(target, test)
    own, task = open_target(target, ranking, base)
    task = task or task_beside([*(expert.folder for expert in opened), *checkpoints])
    if task is None:
        raise PimergeError(
            "the target is not known" if given else "there is nothing to score",
            "pass --target FOLDER (an expert's or a task's)" if given else "name experts, or run 'pimerge tune'",
        )
    scores = []
    if opened or own or base:
        scores = score_experts(
            rows, task, base_of(opened, own, base), own, device=device, dtype=dtype, track=track, note=note
        )
    for path in checkpoints:
        scores.append(score_checkpoint(path, task, device=device, dtype=dtype, track=track, note=note))
    return Evaluation(task.name, task, scores)


def _written(given: Scorable) -> str | Path | Expert | Ensemble:
    """Return the folder of a result of tune or merge; return everything else unchanged."""
    if isinstance(given, TuneResult):
        return given.output
    if not isinstance(given, str | Path | Expert | Ensemble | Merged):
        raise PimergeError(f"cannot score {given!r}", "expected experts, ensembles, full checkpoints, or their folders")
    if not isinstance(given, Merged):
        return given
    if given.path is None:
        raise PimergeError("the merge is not saved, so it cannot be scored", "call its save(FOLDER) first")
    return given.path


def _is_checkpoint(given: object) -> bool:
    """Whether something is the path of a full checkpoint."""
    return isinstance(given, str | Path) and is_checkpoint(given)


def _opened(given: Sequence[str | Path | Expert | Ensemble], base: str | None) -> list[Expert | Ensemble]:
    """Open experts and ensembles in their order; the problems of all are raised at once."""
    found: dict[int, Expert | Ensemble] = {}
    references: dict[int, str] = {}
    for place, each in enumerate(given):
        if isinstance(each, Expert | Ensemble):
            found[place] = each
        elif is_ensemble(each):
            found[place] = open_ensemble(Path(each), base)
        else:
            references[place] = str(each)
    found |= zip(references, open_all(list(references.values()), base), strict=True)
    experts = {place: each for place, each in found.items() if isinstance(each, Expert)}
    found |= zip(experts, distinguished(list(experts.values())), strict=True)
    return [found[place] for place in range(len(given))]


def _with_test(target: TargetSource | None, test: SplitRows) -> Task:
    """Return the task of rows in memory with the given test split."""
    if target is None or isinstance(target, str | Path | Expert | Task):
        raise PimergeError(
            "test rows were given for a target that is not given as rows",
            "pass the target's rows as well, or leave test out: the target has a test split of its own",
        )
    return Task.from_rows(target, test=test)
