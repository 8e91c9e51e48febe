"""Tune methods and controls on draws of a target's examples, at equal budget, in one process.

The base is loaded once. Of every draw the experts are ranked once, and all methods take that ranking. What has run lies
in a folder, a file for each run, so that a comparison that was killed goes on, and a larger one runs what is new alone.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

from pimerge import __version__
from pimerge.base import Base
from pimerge.bench import Bench, Job, open_bench
from pimerge.comparison_document import ComparisonDocument, Run
from pimerge.cross_validation import choose
from pimerge.errors import Problems
from pimerge.evaluation import Split, read_test_split, score_model
from pimerge.expert import Expert
from pimerge.features import Draw, Viewer, why_not
from pimerge.files import json_text, read_json, sha256_bytes, write_file
from pimerge.paired import conclusion, lines_of
from pimerge.progress import Track, silent
from pimerge.ranking import Target
from pimerge.ranking_by_examples import rank_by_examples
from pimerge.selecting import BY_EXAMPLES, Wish
from pimerge.task import Task
from pimerge.training import Options, check_options
from pimerge.tuning_method import TuneMethod, open_tune_method

SINGLE = "single"
"""The best single expert: the ranking's first with a head, as ``uniform`` has it of several."""
CONTROLS = ("head", "scratch", "full", SINGLE, "uniform", "random")
RANKED_BY = ("draws", "ranking")
BY_ONE_EXAMPLE = "logme"
"""The measure where a class has one example, of which nothing can be held out."""
LIMIT = 500
FEATURES = "features"
_WAIT = 0.5
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Design:
    """What is compared.

    Attributes:
        methods: tune methods and controls (:data:`CONTROLS`), in the order of the table.
        shots: examples of each class; None for all.
        seeds: so many draws, 0, 1, ….
        experts: numbers of ranked experts that are at hand.
        options: of every training; shots and seed are each run's.
        select: as :func:`pimerge.tuning.tune` takes it.
        lrs: method → learning rate, where it is not the method's usual one.
        ranked_by: ``draws``: the experts are ranked on the examples of each draw; ``ranking``: as they come.
        split: of the data, that the examples are drawn from; None for the task's train split.
    """

    methods: Sequence[str]
    shots: Sequence[int | None]
    seeds: int
    experts: Sequence[int]
    options: Options
    select: str = "fixed"
    lrs: Mapping[str, float] = field(default_factory=dict)
    ranked_by: str = RANKED_BY[0]
    split: str | None = None

    @property
    def controls(self) -> list[str]:
        """Those of the methods that are controls."""
        return [name for name in self.methods if name in CONTROLS]


@dataclass(frozen=True)
class Case:
    """One run to be made."""

    method: str
    shots: int | None
    seed: int
    k: int


def compare(
    task: Task,
    base: Base,
    pool: Sequence[Expert],
    scores: Sequence[float | None],
    gains: Sequence[float | None],
    design: Design,
    folder: Path,
    *,
    also: Sequence[Task] = (),
    before: Callable[[], None] = lambda: None,
    device: str = "auto",
    dtype: str = "auto",
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> ComparisonDocument | None:
    """Run what has not run yet, and sum up.

    Under ``accelerate launch`` every process takes its share of the runs, on a device of its own; the first sums up.

    Args:
        task: the target's. Its own expert, if it has one, has no part: it may have seen more examples.
        pool: the experts, the target's own not among them; as a ranking has them, if ``design.ranked_by`` says so.
        scores: of the pool in that ranking; ``gains``: that it expects.
        folder: of the runs.
        also: further tasks whose test splits the results are scored on, with the target's classes.
        before: called if anything is to be run, before it is.

    Returns:
        None in a process that does not sum up.

    Raises:
        PimergeError: if the design does not fit the data or the experts, or a run fails.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and device == "auto":
        device = _own_device()
    for name in _DISTRIBUTED:  # a run has one process
        os.environ.pop(name, None)
    if design.split is not None:
        splits = {**task.file.splits, "train": design.split}
        task = replace(task, file=task.file.model_copy(update={"splits": splits}))
    methods = {name: open_tune_method("uniform" if name == SINGLE else name) for name in design.methods}
    _check(task, pool, design, methods, also, note)
    cases = list(_cases(design, methods))
    harness = _Harness(task, base, pool, scores, gains, design, methods, folder, [task, *also], device, dtype)
    if any(harness.done(case) is None for case in cases):
        before()
    mine = [case for number, case in enumerate(cases) if number % world == rank]
    with track("comparing", len(mine), "runs") as advance:
        for case in mine:
            harness.run(case)
            advance(1, f"{case.method}, {shots_text(case.shots)}, seed {case.seed}")
    if rank > 0:
        return None
    while any(harness.done(case) is None for case in cases):  # what the other processes do
        time.sleep(_WAIT)
    shutil.rmtree(folder / FEATURES, ignore_errors=True)
    runs = [run for case in cases if (run := harness.done(case))]
    return ComparisonDocument(
        target=task.name,
        base=base.name,
        metric=task.metrics[0],
        options={
            **asdict(design.options),
            "select": design.select,
            "lrs": dict(design.lrs),
            "rank_by": design.ranked_by,
        },
        experts=sorted(expert.name for expert in pool),
        runs=runs,
        lines=lines_of(runs, design.controls),
        conclusion=conclusion(runs, design.controls, task.metrics[0]),
    )


def shots_text(shots: int | None) -> str:
    """How many examples, as people say it.

    >>> shots_text(1), shots_text(5), shots_text(None)
    ('1 shot', '5 shots', 'all examples')
    """
    return "all examples" if shots is None else "1 shot" if shots == 1 else f"{shots} shots"


class _Harness:
    """The base in memory, the rankings of the draws, and the folder of the runs."""

    def __init__(
        self,
        task: Task,
        base: Base,
        pool: Sequence[Expert],
        scores: Sequence[float | None],
        gains: Sequence[float | None],
        design: Design,
        methods: Mapping[str, TuneMethod],
        folder: Path,
        tests: Sequence[Task],
        device: str,
        dtype: str,
    ) -> None:
        self.pool, self.scores, self.gains = pool, scores, gains
        self.design, self.methods, self.folder = design, methods, folder
        self.task, self.base, self.device, self.dtype = task, base, device, dtype
        self.test_tasks = {"test": tests[0], **{each.name: each for each in tests[1:]}}
        self.inputs = [
            __version__,
            *(each.sha256() for each in tests),
            base.identity,
            [expert.sha256 for expert in pool],
            dtype,
        ]
        self.ranked = cache(self._ranked)

    @cached_property
    def bench(self) -> Bench:
        """The base, loaded when the first run is made."""
        return open_bench(self.task, self.base, self.device, self.dtype)

    @cached_property
    def tests(self) -> dict[str, Split]:
        """The test sets by name."""
        return {name: read_test_split(task, self.bench.loaded, self.pool) for name, task in self.test_tasks.items()}

    def done(self, case: Case) -> Run | None:
        """What a run gave, if it has been made."""
        file = self._file(case)
        return Run.model_validate(read_json(file)) if file.is_file() else None

    def run(self, case: Case) -> None:
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
            lr=lr or self.design.options.lr or method.plan.usual_lr,
        )
        experts, scores, gains = self.ranked(case.shots, case.seed) if case.k else ([], [], [])
        work = self._file(case).with_suffix(".training")
        like = next(iter(self.pool), None)
        job = Job(self.bench, experts[: case.k], None, like, scores[: case.k], options, work, gains[: case.k])
        started = time.monotonic()
        problems = Problems()
        with problems.collected(f"{case.method}, {shots_text(case.shots)}, seed {case.seed}: "):
            if self.design.select == "cv":
                job = replace(job, options=choose(method, job))
            with self.bench.tidied(case.seed) as undo:
                fitted = method.fit(replace(job, undo=undo))
                seconds = time.monotonic() - started
                results = {name: score_model(case.method, fitted.model, test) for name, test in self.tests.items()}
        problems.raise_any("a run failed; those before it are kept")
        metric = self.task.metrics[0]
        run = Run(
            method=case.method,
            shots=case.shots,
            seed=case.seed,
            k=case.k,
            experts=[expert.name for expert in experts[: case.k]],
            scores={name: result.metrics[metric].value for name, result in results.items()},
            losses={name: result.loss for name, result in results.items()},
            trained_parameters=fitted.outcome.trained_parameters,
            deployed_parameters=fitted.deployed_parameters,
            epochs=fitted.outcome.epochs,
            seconds=seconds,
        )
        write_file(self._file(case), json_text(run.model_dump()))
        shutil.rmtree(work, ignore_errors=True)

    def _ranked(self, shots: int | None, seed: int) -> tuple[list[Expert], list[float | None], list[float | None]]:
        """The pool on the examples of a draw, best first, each at its best strength; the scores, and the gains."""
        if self.design.ranked_by == "ranking":
            return list(self.pool), list(self.scores), list(self.gains)
        bench = self.bench
        viewer = Viewer(bench.loaded, bench.base, bench.task, Draw("train", shots, LIMIT, seed), self.folder / FEATURES)
        measure = BY_EXAMPLES if viewer.holds_out else BY_ONE_EXAMPLE
        experts = {expert.name: expert for expert in self.pool}
        target = Target(name=bench.task.name, path=".", sha256=bench.task.sha256(), expert=False)
        wish = Wish(max(self.design.experts), gate=False)
        ranking = rank_by_examples(viewer, experts, {}, target, None, measure, wish, self.folder)
        chosen = ranking.chosen()
        return (
            [experts[each.name].scaled(each.scale) for each in chosen],
            [each.score for each in chosen],
            [each.gain if viewer.holds_out else None for each in chosen],
        )

    def _file(self, case: Case) -> Path:
        design = self.design
        method = self.methods[case.method]
        choice = [
            asdict(case),
            method.resolved,
            asdict(design.options),
            design.select,
            design.lrs.get(case.method),
            design.ranked_by if case.k else None,
            max(design.experts) if case.k and design.ranked_by == "draws" else None,
            self.inputs,
        ]
        digest = sha256_bytes(json.dumps(choice, sort_keys=True).encode())[:16]
        return self.folder / f"{case.method}-{digest}.json"


def _cases(design: Design, methods: Mapping[str, TuneMethod]) -> Iterator[Case]:
    """All runs; a method without experts has one for each draw, whatever the numbers of experts."""
    for shots in design.shots:
        for seed in range(design.seeds):
            for name in design.methods:
                counts = [1] if name == SINGLE else design.experts if methods[name].plan.experts else [0]
                yield from (Case(name, shots, seed, k) for k in counts)


def _check(
    task: Task,
    pool: Sequence[Expert],
    design: Design,
    methods: Mapping[str, TuneMethod],
    also: Sequence[Task],
    note: Callable[[str], None],
) -> None:
    """Check the design against the data and the pool, before anything runs."""
    check_options(design.options)
    problems = Problems()
    if design.seeds < 1:
        problems.add(f"--seeds is {design.seeds}, expected at least 1")
    if design.ranked_by not in RANKED_BY:
        problems.add(f"--rank-by is '{design.ranked_by}'", f"expected {' or '.join(RANKED_BY)}")
    for name in sorted(design.lrs.keys() - methods.keys()):
        problems.add(f"--lr names '{name}', which is not compared", f"expected one of {', '.join(methods)}")
    for shots in design.shots:
        if shots is not None and shots < 1:
            problems.add(f"--shots has {shots}, expected at least 1, or all")
    for k in design.experts:
        if k < 1:
            problems.add(f"--experts has {k}, expected at least 1")
    composing = [name for name, method in methods.items() if method.plan.experts]
    most = max([*design.experts, 0])
    if composing and len(pool) < most:
        problems.add(
            f"{', '.join(composing)}: {most} experts are asked for, and there are {len(pool)} besides the target's own",
            "name more experts or a pool, or pass a smaller --experts",
        )
    if composing and design.ranked_by == "draws" and (reason := why_not(task)):
        problems.add(f"the experts cannot be ranked on each draw: {reason}", "pass --rank-by ranking")
    for other in also:
        if other.labels != task.labels or other.file.type != task.file.type:
            problems.add(
                f"'{other.path}' is about {', '.join(other.labels) or other.file.type}, the target about "
                f"{', '.join(task.labels) or task.file.type}",
                "a further test needs the type and the classes of the target",
            )
    problems.raise_any("this cannot be compared")
    with problems.collected():
        _, labels = task.rows("train")
        counts = Counter(labels)
        for shots in design.shots:
            short = [task.labels[label] for label, count in sorted(counts.items()) if shots and count < shots]
            if task.labels and short and not task.of_words:
                least = min(counts.values())
                problems.add(
                    f"{shots} shots are asked for, and of {', '.join(short)} there are fewer: {least}",
                    f"pass --shots {least} or all, or --draw-from with a larger split",
                )
        if design.seeds > 1 and any(shots is None or set(counts.values()) == {shots} for shots in design.shots):
            note("where all examples are taken, seeds differ in init and order alone")
    problems.raise_any("the data cannot give what is asked for")


def _own_device() -> str:
    import torch

    index = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{index}" if index < torch.cuda.device_count() else "auto"
