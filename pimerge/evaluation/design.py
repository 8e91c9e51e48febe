"""The design of a comparison: methods and controls, numbers of training examples and of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pimerge.adapters.expert import Expert
from pimerge.core.errors import Problems, nearest
from pimerge.embedding.features import why_not
from pimerge.tasks.task import Task
from pimerge.tuning.class_name_examples import class_texts
from pimerge.tuning.method import METHODS, TuneMethod, open_tune_method
from pimerge.tuning.options import TrainingOptions, check_options

SINGLE = "single"
"""The control that is not a tune method: the ranking's first expert with a new head, trained by ``uniform``."""
USUAL_CONTROLS = ("head", "scratch", "full", SINGLE, "uniform")
RANKED_BY = ("draws", "ranking")


@dataclass(frozen=True)
class ComparisonDesign:
    """The methods to compare, and on what.

    Attributes:
        methods: tune methods and controls, in the order of the table.
        shots: examples of each class; None for all.
        seeds: number of samplings of the examples, with the seeds 0, 1, ….
        experts: numbers of ranked experts that a method gets.
        options: training options of all runs, except shots and seed.
        select: see :func:`pimerge.tuning.tune.tune`.
        lrs: method → learning rate, if it is not the method's default.
        ranked_by: ``draws`` ranks the experts on the examples of each sampling; ``ranking`` keeps the order of the
            ranking.
        split: the split of the data that examples are sampled from; None for the task's train split.
    """

    methods: Sequence[str]
    shots: Sequence[int | None]
    seeds: int
    experts: Sequence[int]
    options: TrainingOptions
    select: str = "fixed"
    lrs: Mapping[str, float] = field(default_factory=dict)
    ranked_by: str = RANKED_BY[0]
    split: str | None = None

    @property
    def controls(self) -> list[str]:
        """The methods that are controls."""
        return [name for name in self.methods if name in all_controls()]


@dataclass(frozen=True)
class RankedExpert:
    """An expert of the pool with its score and expected gain; None if no ranking has them."""

    expert: Expert
    score: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class PlannedRun:
    """A run of a comparison."""

    method: str
    shots: int | None
    seed: int
    k: int


def all_controls() -> list[str]:
    """Return the names of all controls."""
    return [*(method.name for method in METHODS if method.control), SINGLE]


def usual_controls(task: Task, methods: Sequence[str]) -> list[str]:
    """Return the default controls of some methods.

    If a method uses the names of classes as examples, a fresh LoRA that uses them as well is a control, since a gain by
    the names is not due to the experts.
    """
    use_names = any(open_tune_method(name).plan.class_names for name in methods if name != SINGLE)
    named = [method.name for method in METHODS if method.control and method.plan.class_names]
    return [*USUAL_CONTROLS, *(named if use_names and class_texts(task) else [])]


def check_names(methods: Sequence[str], controls: Sequence[str]) -> None:
    """Check that methods and controls exist."""
    problems = Problems()
    for name in [name for name in controls if name not in all_controls()]:
        problems.add(f"there is no control '{name}'", f"expected {', '.join(all_controls())}, or none")
    known = [*METHODS.names(), SINGLE]
    for name in (name.replace("_", "-") for name in methods):
        if name not in known:
            problems.add(f"there is no tune method '{name}'", nearest(name, known))
    problems.raise_any("these cannot be compared")


def shots_text(shots: int | None) -> str:
    """Return the number of training examples per class in words.

    >>> shots_text(1), shots_text(5), shots_text(None)
    ('1 shot', '5 shots', 'all examples')
    """
    return "all examples" if shots is None else "1 shot" if shots == 1 else f"{shots} shots"


def cases_of(design: ComparisonDesign, methods: Mapping[str, TuneMethod]) -> Iterator[PlannedRun]:
    """Yield all runs; a method without experts has one run for each sampling, for any numbers of experts."""
    for shots in design.shots:
        for seed in range(design.seeds):
            for name in design.methods:
                counts = [1] if name == SINGLE else design.experts if methods[name].plan.experts else [0]
                yield from (PlannedRun(name, shots, seed, k) for k in counts)


def check_design(
    task: Task,
    experts: int,
    design: ComparisonDesign,
    methods: Mapping[str, TuneMethod],
    also: Sequence[Task],
    note: Callable[[str], None],
) -> None:
    """Check a design before anything runs.

    Args:
        experts: number of experts, without the target's own.
        also: further tasks whose test splits are scored.
        note: receives remarks, one sentence at a time.
    """
    check_options(design.options)
    problems = Problems()
    _check_numbers(design, methods, problems)
    composing = [name for name, method in methods.items() if method.plan.experts]
    most = max([*design.experts, 0])
    if composing and experts < most:
        problems.add(
            f"{', '.join(composing)}: {most} experts are asked for, and there are {experts} besides the target's own",
            "name more experts or a pool, or pass a smaller --experts",
        )
    if composing and design.ranked_by == "draws" and (reason := why_not(task)):
        problems.add(f"the experts cannot be ranked on each sampling: {reason}", "pass --rank-by ranking")
    for other in also:
        if other.labels != task.labels or other.file.type != task.file.type:
            problems.add(
                f"'{other.path}' is about {', '.join(other.labels) or other.file.type}, the target about "
                f"{', '.join(task.labels) or task.file.type}",
                "a further test needs the target's task type and classes",
            )
    problems.raise_any("this cannot be compared")
    with problems.collected():
        _, labels = task.rows("train")
        _check_data(task, design, Counter(labels), problems, note)
    problems.raise_any("the data does not suffice for this comparison")


def _check_numbers(design: ComparisonDesign, methods: Mapping[str, TuneMethod], problems: Problems) -> None:
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


def _check_data(
    task: Task, design: ComparisonDesign, counts: Counter[int], problems: Problems, note: Callable[[str], None]
) -> None:
    """Check that each class has enough examples for the numbers of shots."""
    for shots in design.shots:
        short = [task.labels[label] for label, count in sorted(counts.items()) if shots and count < shots]
        if task.labels and short and not task.of_words and not task.up_to_shots:
            least = min(counts.values())
            problems.add(
                f"{shots} shots are asked for, but {', '.join(short)} has fewer examples: {least}",
                f"pass --shots {least} or all, --up-to-shots, or --draw-from with a larger split",
            )
    if design.seeds > 1 and any(shots is None or set(counts.values()) == {shots} for shots in design.shots):
        note("with all examples, the seeds differ only in init and order")
