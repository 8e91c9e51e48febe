"""Run tune methods and controls on samples of a target's examples, with equal budget, in one process.

The base is loaded once. The experts are ranked once per sampling, and all methods use that ranking. Each ranking and
each run is a file in a folder, so an interrupted comparison continues, and a larger one makes only the new runs.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from pimerge.adapters.ranking_document import Ranking, Target
from pimerge.checkpoints.base import Base
from pimerge.core.documents import parse_document
from pimerge.core.errors import Problems
from pimerge.core.files import json_text, put_in_order, relative_to, sha256_bytes, write_file
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.core.version import __version__
from pimerge.embedding.features import FeatureReader, Sampling
from pimerge.evaluation.design import (
    SINGLE,
    ComparisonDesign,
    PlannedRun,
    RankedExpert,
    cases_of,
    check_design,
    shots_text,
)
from pimerge.evaluation.paired_stats import conclusion, lines_of
from pimerge.evaluation.schema import ComparisonDocument, ComparisonRun
from pimerge.evaluation.scoring import TestSplit, read_test_split, score_model
from pimerge.ranking.by_examples import rank_by_examples
from pimerge.ranking.measure import BY_EXAMPLES, MEASURES
from pimerge.ranking.selection import SelectionRule
from pimerge.tasks.task import Task
from pimerge.tuning.cross_validation import choose
from pimerge.tuning.fit import fit
from pimerge.tuning.method import TuneMethod, open_tune_method
from pimerge.tuning.session import TuneRequest, TuningSession, open_session

BY_ONE_EXAMPLE = "logme"
"""The measure for samplings with one example per class, of which nothing can be held out."""
LIMIT = 500
FEATURES, RANKINGS = "features", "rankings"
ANEW = "delete the file; it is created again"
_WAIT = 0.5
_TRAINING = ".training"
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What to compare, and where the runs are kept.

    Attributes:
        task: the target's task. The target's own expert is left out, since it may have seen more examples.
        pool: the experts, in the order of a ranking if ``design.ranked_by`` is ``ranking``.
        folder: folder of the runs.
        also: further tasks with the target's classes whose test splits are scored as well.
    """

    task: Task
    base: Base
    pool: Sequence[RankedExpert]
    design: ComparisonDesign
    folder: Path
    also: Sequence[Task] = ()
    device: str = "auto"
    dtype: str = "auto"


def run_comparison(
    request: ComparisonRequest,
    *,
    before: Callable[[], None] = lambda: None,
    track: Track = silent,
    note: Note = unheard,
) -> ComparisonDocument | None:
    """Make the missing runs and summarise all runs.

    Under ``accelerate launch`` each process makes its share of the runs on its own device; the first one summarises.

    Args:
        before: called before the first run if any run is missing.

    Returns:
        None in a process that does not summarise.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and request.device == "auto":
        request = replace(request, device=_own_device())
    for name in _DISTRIBUTED:  # each run uses one process
        os.environ.pop(name, None)
    task, design = request.task, request.design
    if design.split is not None:
        splits = {**task.file.splits, "train": design.split}
        request = replace(request, task=replace(task, file=task.file.model_copy(update={"splits": splits})))
    methods = {name: open_tune_method("uniform" if name == SINGLE else name) for name in design.methods}
    check_design(request.task, len(request.pool), design, methods, request.also, note)
    cases = list(cases_of(design, methods))
    runner = _ComparisonRunner(request, methods)
    if any(runner.done(case) is None for case in cases):
        before()
    mine = [case for number, case in enumerate(cases) if number % world == rank]
    with track("comparing", len(mine), "runs") as advance:
        for case in mine:
            runner.run(case)
            advance(1, f"{case.method}, {shots_text(case.shots)}, seed {case.seed}")
    if rank > 0:
        return None
    while any(runner.done(case) is None for case in cases):  # the other processes make them
        time.sleep(_WAIT)
    shutil.rmtree(request.folder / FEATURES, ignore_errors=True)
    return _summed_up(request, [run for case in cases if (run := runner.done(case))])


def _summed_up(request: ComparisonRequest, runs: Sequence[ComparisonRun]) -> ComparisonDocument:
    task, design = request.task, request.design
    return ComparisonDocument(
        target=task.name,
        base=request.base.name,
        metric=task.metrics[0],
        options={
            **asdict(design.options),
            "select": design.select,
            "lrs": dict(design.lrs),
            "rank_by": design.ranked_by,
        },
        experts=sorted(each.expert.name for each in request.pool),
        runs=list(runs),
        lines=lines_of(runs, design.controls),
        conclusion=conclusion(runs, design.controls, task.metrics[0]),
    )


class _ComparisonRunner:
    """Makes the runs of a comparison, with the base in memory, the rankings of the samplings and the folder of runs."""

    def __init__(self, request: ComparisonRequest, methods: Mapping[str, TuneMethod]) -> None:
        self.methods, self.pool, self.design, self.folder = methods, request.pool, request.design, request.folder
        self.task, self.base, self.device, self.dtype = request.task, request.base, request.device, request.dtype
        tests = [request.task, *request.also]
        self.test_tasks = {"test": tests[0], **{each.name: each for each in tests[1:]}}
        self.inputs = [
            __version__,
            *(each.sha256() for each in tests),
            self.base.identity,
            [each.expert.sha256 for each in self.pool],
            self.dtype,
        ]
        self.ranked = cache(self._ranked)
        self.runs: dict[PlannedRun, ComparisonRun] = {}

    @cached_property
    def session(self) -> TuningSession:
        """The base, loaded before the first run."""
        return open_session(self.task, self.base, self.device, self.dtype)

    @cached_property
    def tests(self) -> dict[str, TestSplit]:
        """The test sets by name."""
        experts = [each.expert for each in self.pool]
        return {name: read_test_split(task, self.session.loaded, experts) for name, task in self.test_tasks.items()}

    def done(self, case: PlannedRun) -> ComparisonRun | None:
        """Return the result of a run; None if it has not been made."""
        if case not in self.runs and (file := self._file(case)).is_file():
            put_in_order(file)
            shutil.rmtree(file.with_suffix(_TRAINING), ignore_errors=True)  # a stop between the last two steps left it
            self.runs[case] = parse_document(ComparisonRun, file, ANEW)
        return self.runs.get(case)

    def run(self, case: PlannedRun) -> None:
        """Make a run, unless it has been made."""
        if self.done(case) is not None:
            return
        method = self.methods[case.method]
        lr = self.design.lrs.get(case.method)
        options = replace(
            self.design.options,
            shots=case.shots,
            seed=case.seed,
            init_seed=case.seed,
            lr=lr or self.design.options.lr or method.plan.usual_lr(self.session.loaded.width),
        )
        ranked = self.ranked(case.shots, case.seed)[: case.k] if case.k else []
        experts, scores, gains = ([getattr(each, name) for each in ranked] for name in ("expert", "score", "gain"))
        work = self._file(case).with_suffix(_TRAINING)
        like = self.pool[0].expert if self.pool else None
        request = TuneRequest(self.session, experts, None, like, scores, options, work, gains)
        started = time.monotonic()
        problems = Problems()
        with problems.collected(f"{case.method}, {shots_text(case.shots)}, seed {case.seed}: "):
            if self.design.select == "cv":
                request = replace(request, options=choose(method, request))
            with self.session.restored(case.seed) as undo:
                result = fit(method, replace(request, undo=undo))
                seconds = time.monotonic() - started
                results = {name: score_model(case.method, result.model, test) for name, test in self.tests.items()}
        problems.raise_any("a run failed; earlier runs are kept")
        metric = self.task.metrics[0]
        run = ComparisonRun(
            method=case.method,
            shots=case.shots,
            seed=case.seed,
            k=case.k,
            experts=[expert.name for expert in experts],
            scores={name: result.metrics[metric].value for name, result in results.items()},
            losses={name: result.loss for name, result in results.items()},
            trained_parameters=result.outcome.trained_parameters,
            deployed_parameters=result.deployed_parameters,
            epochs=result.outcome.epochs,
            seconds=seconds,
            class_names=result.settings["class_names"],
        )
        write_file(self._file(case), json_text(run.model_dump()))
        shutil.rmtree(work, ignore_errors=True)

    def _ranked(self, shots: int | None, seed: int) -> Sequence[RankedExpert]:
        """Rank the pool on the examples of a sampling, best first, each expert at its best strength."""
        if self.design.ranked_by == "ranking":
            return self.pool
        file = self.folder / RANKINGS / f"{_digest([shots, seed, self.inputs])}.json"
        if not file.is_file():
            self._rank(shots, seed).save(file, force=True)
        ranking = parse_document(Ranking, file, ANEW)
        experts = {each.expert.name: each.expert for each in self.pool}
        held_out = ranking.measure == BY_EXAMPLES
        return [
            RankedExpert(experts[each.name].with_strength(each.scale), each.score, each.gain if held_out else None)
            for each in ranking.chosen()
        ]

    def _rank(self, shots: int | None, seed: int) -> Ranking:
        session, cached = self.session, self.folder / FEATURES
        reader = FeatureReader(
            session.loaded, session.base, session.task, Sampling("train", shots, LIMIT, seed), cached
        )
        measure = MEASURES.load(BY_EXAMPLES if reader.holds_out else BY_ONE_EXAMPLE)
        experts = {each.expert.name: each.expert for each in self.pool}
        here = relative_to(self.folder / RANKINGS, Path())
        target = Target(name=session.task.name, path=here, sha256=session.task.sha256(), expert=False)
        return rank_by_examples(reader, experts, {}, target, None, measure, SelectionRule(len(experts), gate=False))

    def _file(self, case: PlannedRun) -> Path:
        design = self.design
        method = self.methods[case.method]
        as_they_come = [(each.expert.strength, each.score, each.gain) for each in self.pool]
        choice = [
            asdict(case),
            method.defaults,
            asdict(design.options),
            design.select,
            design.lrs.get(case.method),
            (as_they_come if design.ranked_by == "ranking" else design.ranked_by) if case.k else None,
            self.inputs,
        ]
        return self.folder / f"{case.method}-{_digest(choice)}.json"


def _digest(choice: object) -> str:
    return sha256_bytes(json.dumps(choice, sort_keys=True).encode())[:16]


def _own_device() -> str:
    import torch

    index = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{index}" if index < torch.cuda.device_count() else "auto"
