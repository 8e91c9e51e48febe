"""What ``pimerge rank`` does with a target: find it, choose the measure, rank."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pimerge import strategies
from pimerge.base import Base, find_base
from pimerge.calibration import measure_gains
from pimerge.cli.console import note, warn
from pimerge.comparison import SHORTLIST, compare, nearest_by_sketch
from pimerge.compatibility import check_expert
from pimerge.embedding import embed
from pimerge.errors import PimergeError, Problems
from pimerge.expert import CONFIG, Expert, open_expert
from pimerge.features import SCALES, Draw, Viewer
from pimerge.few_shot import gains_by_part
from pimerge.files import relative_to, require_absent
from pimerge.model import Bases, load_base, resolve_device, resolve_dtype
from pimerge.progress import Track
from pimerge.ranking import Ranking, Target
from pimerge.selecting import BY_EXAMPLES, BY_STORE, Wish, rank_by_examples, rank_by_history, rank_by_store
from pimerge.store import SIDECARS, Store, open_store, unknown_target
from pimerge.target_expert import initial_expert, train_expert
from pimerge.task import TASK_FILE, Task, open_task
from pimerge.training import Options

AUTO = "auto"
TARGETS = "targets"
STORED = ("fisher", "marginals", "experts")
"""What a measure of the store may need."""


@dataclass(frozen=True)
class Request:
    """The options of ``pimerge rank``, by their names there."""

    store: Path
    measure: str
    k: int | None
    gate: bool
    shots: int | None
    examples: int
    seed: int
    train_target: bool
    base: str | None
    device: str
    dtype: str
    force: bool
    quiet: bool

    @property
    def wish(self) -> Wish:
        """How many, and whether gated."""
        return Wish(self.k, self.gate)


@dataclass(frozen=True)
class Asked:
    """The target as it was found.

    Attributes:
        name: in the store, if it is there.
        expert: its own, if it has one.
        folder: of the expert or of the task.
    """

    name: str
    expert: Expert | None
    folder: Path

    def task(self) -> Task:
        """Its task.

        Raises:
            PimergeError: if there is none, or it does not fit.
        """
        return open_task(self.folder)

    def named_from(self, folder: Path) -> Target:
        """As the ranking in a folder names it."""
        sha256 = self.expert.sha256 if self.expert else self.task().sha256()
        path = relative_to(self.folder, folder)
        return Target(name=self.name, path=path, sha256=sha256, expert=self.expert is not None)


def make_ranking(target: str, request: Request, folder: Path, track: Track) -> Ranking:
    """Rank the experts of the store for a target.

    Without a measure given, a target with an expert is ranked by the store where its examples cannot be used; but not
    where ``--shots`` asks for them.

    Args:
        folder: where the ranking will lie.

    Raises:
        PimergeError: if the target or its examples do not serve the measure that was asked for.
    """
    if request.measure != AUTO:
        strategies.load("measures", request.measure)
    store = open_store(request.store)
    asked = find_target(target, store, request.base)
    if asked.expert is None and request.train_target:
        asked = _trained(asked, store, request, track)
    measure = BY_EXAMPLES if request.measure == AUTO else request.measure
    needs = strategies.load("measures", measure).NEEDS
    if needs == "history":
        experts, excluded = pool_of(store, asked, pool_base(store, asked, request.base))
        return rank_by_history(store, experts, excluded, asked.named_from(folder), request.wish, folder)
    if needs != "examples":
        return _by_store(asked, store, measure, request, folder, track)
    try:
        return _by_examples(asked, store, measure, request, folder, track)
    except PimergeError as error:
        if request.measure != AUTO or asked.expert is None or request.shots is not None:
            raise
        reason = error.problems[0].message
    ranking = _by_store(asked, store, BY_STORE, request, folder, track)
    why = f"the target's examples cannot be used ({reason}): ranked by '{BY_STORE}' from the store"
    return ranking.model_copy(update={"notes": [why, *ranking.notes]})


def find_target(target: str, store: Store, base: str | None) -> Asked:
    """A target by its name in the store, an expert's folder or a task's.

    A task for which ``--train-target`` has trained an expert has that one, as long as the task is the same.

    Args:
        base: in place of the one that an expert outside the store names.

    Raises:
        PimergeError: if it is none of these.
    """
    known = store.find(target)
    if known is not None:
        return Asked(known, store.open(known), store.folder_of(known))
    path = Path(target)
    folder = path.parent if path.is_file() and path.name == TASK_FILE else path
    if not folder.is_dir():
        raise unknown_target(target, store)
    if (folder / CONFIG).is_file():
        expert = open_expert(folder, base)
        return Asked(expert.name, expert, folder)
    task = open_task(folder)
    trained = _folder_for(store, task.name)
    known = store.find(str(trained.resolve()))
    if known is not None and trained.is_dir() and store.experts[known].task_sha256 == task.sha256():
        return Asked(known, store.open(known), trained)
    return Asked(task.name, None, folder)


def pool_base(store: Store, asked: Asked, reference: str | None) -> Base:
    """The base given, else the target expert's, else that of all experts of the store.

    Raises:
        PimergeError: if the experts have several bases and none is given, or none of them can be opened.
    """
    if reference is not None:
        name, _, revision = reference.partition("@")
        return find_base(name, revision or None, Path.cwd())
    if asked.expert is not None:
        return asked.expert.base
    count = len({entry.base for entry in store.experts.values()})
    if count > 1:
        raise PimergeError(
            f"the experts of '{store.path}' have {count} bases, and a task alone does not say which is meant",
            "pass --base with the target's",
        )
    problems = Problems()
    for name in store.experts:
        with problems.collected():
            return store.open(name).base
    problems.raise_any(f"no expert of '{store.path}' can be opened")
    raise AssertionError("unreachable: a store has experts")


def pool_of(
    store: Store, asked: Asked, base: Base, only: Sequence[str] | None = None
) -> tuple[dict[str, Expert], dict[str, str]]:
    """The experts of the store on a base, the target left out, and why the others are not among them.

    Args:
        only: these names; None for all.
    """
    experts: dict[str, Expert] = {}
    excluded: dict[str, str] = {}
    target = store.find(str(asked.folder.resolve()))
    for name, entry in store.experts.items():
        if name == target or (only is not None and name not in only):
            continue
        try:
            expert = store.open(name)
        except PimergeError as error:
            excluded[name] = error.problems[0].message
            continue
        if entry.base == base.identity:
            experts[name] = expert
        else:
            excluded[name] = f"its base is {expert.base.name}, another model than the target's {base.name}"
    return experts, excluded


def open_viewer(task: Task, store: Store, base: Base, request: Request) -> Viewer:
    """The target's training examples under a base; what is computed of them is kept beside the store.

    Raises:
        PimergeError: if they cannot be read.
    """
    device = resolve_device(request.device)
    loaded = load_base(base, task, device, resolve_dtype(request.dtype, device))
    draw = Draw("train", request.shots, request.examples, request.seed)
    return Viewer(loaded, base, task, draw, store.path.parent / SIDECARS / "features")


def calibrate_store(request: Request, track: Track) -> dict[str, dict[str, dict[float, float]]]:
    """Measure the gain of every expert of the store for every other's task, and keep them in the store.

    A target whose task and sources are as they were measured is not measured again, but for ``--force``; one that
    cannot be measured is left out.

    Returns:
        target → source → scale → gain.

    Raises:
        PimergeError: if there is no target that can be measured.
    """
    store = open_store(request.store)
    done = {} if request.force else store.history()
    problems = Problems()
    for number, (name, entry) in enumerate(store.experts.items(), 1):
        with problems.collected(f"'{name}': "):
            asked = Asked(name, store.open(name), store.folder_of(name))
            task, base = asked.task(), pool_base(store, asked, None)
            if task.sha256() != entry.task_sha256:
                raise PimergeError("its task has changed since it was embedded", "run 'pimerge embed' again")
            experts, _ = pool_of(store, asked, base)
            if not experts:
                raise PimergeError("no other expert of the store has its base", "embed the whole pool into one store")
            if done.get(name, {}).keys() == experts.keys():
                continue
            note(f"[{number}/{len(store.experts)}] {name}", request.quiet)
            viewer = open_viewer(task, store, base, request)
            with track("candidates", (1 + len(experts) * len(SCALES)) * len(viewer.labels), "examples") as advance:
                viewer.advance = advance
                store.add_gains(name, measure_gains(viewer, experts))
    if len(problems.found) >= len(store.experts):
        problems.raise_any("no expert's task can be measured")
    for problem in problems.found:
        warn(f"left out: {problem.message}")
    return store.history()


@dataclass(frozen=True)
class Explanation:
    """Why a candidate has its place.

    Attributes:
        scales: scale → measure of the examples → what it gives above the bare base; empty without examples.
        by: the measure of the store whose parts follow.
        tensors: tensor → what it adds to the score by that measure; empty if that does not compare the two.
    """

    scales: dict[float, dict[str, float]]
    by: str
    tensors: dict[str, float]

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"by_scale": self.scales, "measure": self.by, "by_tensor": self.tensors}


def explain(ranking: Ranking, name: str, target: str, request: Request, track: Track) -> Explanation:
    """What makes a candidate's score: by scale on the examples, and by tensor in the store.

    Args:
        ranking: where the candidate is.
        target: as it was asked for.
    """
    store = open_store(request.store)
    asked = find_target(target, store, request.base)
    by = ranking.measure if strategies.load("measures", ranking.measure).NEEDS in STORED else BY_STORE
    if ranking.seen is None:
        with _in_store(asked, store, request, track) as where:
            return Explanation({}, by, _by_tensor(where, asked.name, name, by))
    base = pool_base(store, asked, request.base)
    scales = gains_by_part(open_viewer(asked.task(), store, base, request), store.open(name))
    known = asked.expert is not None and store.find(str(asked.folder.resolve())) is not None
    return Explanation(scales, by, _by_tensor(store, asked.name, name, by) if known else {})


def _by_tensor(store: Store, target: str, name: str, measure: str) -> dict[str, float]:
    """Tensor → what it adds to a candidate's score by a measure of the store."""
    compared = compare(store, target, strategies.load("measures", measure))
    if compared.similarity is None or name not in compared.experts:
        return {}
    added = compared.similarity.contributions()[list(compared.experts).index(name)].tolist()
    return dict(zip(compared.similarity.tensors, added, strict=True))


def _by_examples(asked: Asked, store: Store, measure: str, request: Request, folder: Path, track: Track) -> Ranking:
    base = pool_base(store, asked, request.base)
    viewer = open_viewer(asked.task(), store, base, request)
    if request.measure == AUTO and asked.expert is not None and not viewer.holds_out:
        ranking = _by_store(asked, store, BY_STORE, request, folder, track)
        why = f"one example of a class is too few to judge by: ranked by '{BY_STORE}' from the store"
        return ranking.model_copy(update={"notes": [why, *ranking.notes]})
    others = [name for name in store.experts if name != asked.name]
    only = None
    if len(others) > SHORTLIST and asked.expert is not None and asked.name in store.experts:
        only = nearest_by_sketch(store, asked.name, others, SHORTLIST)
    experts, excluded = pool_of(store, asked, base, only)
    with track("candidates", (1 + len(experts) * len(SCALES)) * len(viewer.labels), "examples") as advance:
        viewer.advance = advance
        ranking = rank_by_examples(
            viewer, experts, excluded, asked.named_from(folder), asked.expert, measure, request.wish, folder
        )
    if only is None:
        return ranking
    why = f"of {len(others)} experts, the {len(only)} nearest by their sketches were tried on the examples"
    return ranking.model_copy(update={"notes": [why, *ranking.notes]})


def _by_store(asked: Asked, store: Store, measure: str, request: Request, folder: Path, track: Track) -> Ranking:
    if asked.expert is None and strategies.load("measures", measure).NEEDS == "experts":
        raise PimergeError(
            f"the target '{asked.name}' has no expert, and '{measure}' compares experts",
            "pass --train-target to train one, or a measure of its examples (--measure combined)",
        )
    with _in_store(asked, store, request, track) as where:
        ranking = rank_by_store(where, asked.name, measure, request.wish, folder)
    if asked.expert is not None:
        return ranking
    why = "the target has no expert: its Fisher is that at the pool's init, with a head trained on its examples"
    return ranking.model_copy(update={"target": asked.named_from(folder), "notes": [why, *ranking.notes]})


@contextmanager
def _in_store(asked: Asked, store: Store, request: Request, track: Track) -> Iterator[Store]:
    """A store that has the target: this one with its expert, or a temporary one on top with the pool's init."""
    if asked.expert is not None:
        if store.find(str(asked.folder.resolve())) is None:
            _embed(asked, store, request, track)
        yield store
        return
    options = Options(shots=request.shots, seed=request.seed)
    base = pool_base(store, asked, request.base)
    with (
        tempfile.TemporaryDirectory() as folder,
        initial_expert(
            _pool(store, asked, base),
            asked.task(),
            base,
            options,
            device=request.device,
            dtype=request.dtype,
            track=track,
        ) as start,
    ):
        note(
            f"{asked.name} has no expert: its Fisher is taken at the pool's init (--train-target trains one)",
            request.quiet,
        )
        overlay = store.overlay(Path(folder))
        _embed(replace(asked, expert=start, folder=start.path), overlay, request, track)
        yield overlay


def _pool(store: Store, asked: Asked, base: Base) -> list[Expert]:
    """The experts that a target without one can start from.

    Raises:
        PimergeError: if there is none.
    """
    experts, excluded = pool_of(store, asked, base)
    if not experts:
        problems = Problems()
        for name, reason in excluded.items():
            problems.add(f"'{name}': {reason}", "rank by the store that holds experts of the target's base")
        problems.raise_any(f"'{asked.name}' has no expert, and the store none for it to start from")
    return list(experts.values())


def _folder_for(store: Store, task: str) -> Path:
    """Where the expert of a task lies that ``--train-target`` trains."""
    return store.path.parent / TARGETS / task


def _trained(asked: Asked, store: Store, request: Request, track: Track) -> Asked:
    """The target with an expert of its own, trained on its examples from the pool's init."""
    output = _folder_for(store, asked.name)
    _refuse_namesake(replace(asked, folder=output), store)
    if output.is_dir() and open_task(output).sha256() == asked.task().sha256():
        note(f"{asked.name}: the expert that was trained before, '{output}'", request.quiet)
    else:
        require_absent(output, request.force)
        note(f"{asked.name} has no expert: training one from the pool's init into '{output}'", request.quiet)
        base = pool_base(store, asked, request.base)
        train_expert(
            _pool(store, asked, base),
            asked.task(),
            base,
            output,
            Options(shots=request.shots, seed=request.seed),
            device=request.device,
            dtype=request.dtype,
            force=request.force,
            track=track,
        )
    trained = Asked(asked.name, open_expert(output, request.base), output)
    _embed(trained, store, request, track)
    return trained


def _embed(asked: Asked, store: Store, request: Request, track: Track) -> None:
    """Embed the target's expert, as the others were."""
    expert = asked.expert
    assert expert is not None
    _refuse_namesake(asked, store)
    note(f"{asked.name} is not in the store yet: embedding it", request.quiet)
    like = next(iter(store.experts.values())).settings
    device = resolve_device(request.device)
    embed(expert, check_expert(expert), store, like, Bases(device, resolve_dtype(like.dtype, device)), track=track)


def _refuse_namesake(asked: Asked, store: Store) -> None:
    if asked.name in store.experts and store.folder_of(asked.name).resolve() != asked.folder.resolve():
        raise PimergeError(
            f"'{store.path}' has another expert of the name '{asked.name}': {store.folder_of(asked.name)}",
            "rename one of the folders",
        )
