"""Add a target to a store: embed its expert, or an expert that is trained or initialised for it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import require_absent
from pimerge.embedding.store import Store
from pimerge.ranking.nearest import SHORTLIST
from pimerge.ranking.target import RankRequest, RankTarget, folder_for, names_on, open_all, pool_base
from pimerge.tasks.task import open_task

if TYPE_CHECKING:
    from pimerge.tuning.target_expert import NewTarget


@contextmanager
def store_with_target(target: RankTarget, store: Store, request: RankRequest) -> Iterator[Store]:
    """Yield a store that holds the target: this store with the target's expert, or a temporary overlay with the
    pool's init in its place."""
    if target.stored:
        yield store
        return
    if target.expert is not None:
        _embed(target, store, request)
        yield store
        return
    from pimerge.tuning.target_expert import initial_expert

    start_from = _start(target, store, request)
    with tempfile.TemporaryDirectory() as folder, initial_expert(start_from, request.track) as start:
        request.note(
            f"{target.name} has no expert: its Fisher information is computed at "
            f"{_init_of(start_from.pool, store)} (--train-target trains an expert)"
        )
        overlay = store.overlay(Path(folder))
        _embed(replace(target, expert=start, folder=start.path), overlay, request)
        yield overlay


def trained(target: RankTarget, store: Store, request: RankRequest) -> RankTarget:
    """Train an expert on the target's examples from the pool's init, embed it, and return the target with it."""
    output = folder_for(store, target.name)
    _refuse_namesake(replace(target, folder=output), store)
    if output.is_dir() and open_task(output).sha256() == target.task().sha256():
        request.note(f"{target.name}: using the expert that was trained before, '{output}'")
    else:
        from pimerge.tuning.target_expert import train_expert

        require_absent(output, request.force)
        start = _start(target, store, request)
        init = _init_of(start.pool, store)
        request.note(f"{target.name} has no expert: training one from {init} into '{output}'")
        train_expert(start, output, force=request.force, track=request.track)
    own = RankTarget(target.name, open_expert(output, request.base), output, stored=True)
    _embed(own, store, request)
    return own


def _start(target: RankTarget, store: Store, request: RankRequest) -> NewTarget:
    """Return the start of an expert for the target, of the most frequent kind, and its training options."""
    from pimerge.tuning.options import TrainingOptions
    from pimerge.tuning.target_expert import NewTarget

    base = pool_base(store, target, request.base)
    names, excluded = names_on(store, target, base)
    kinds = Counter(store.experts[name].kind for name in names)
    if kinds:  # the most frequent kind
        names = [name for name in names if store.experts[name].kind == kinds.most_common(1)[0][0]]
    pool, broken = open_all(store, names[:SHORTLIST])  # their mean init is close to that of all experts
    if not pool:
        problems = Problems()
        for name, reason in (excluded | broken).items():
            problems.add(f"'{name}': {reason}", "rank by the store that holds experts of the target's base")
        problems.raise_any(
            f"'{target.name}' has no expert, and the store has no expert that its training could start from"
        )
    return NewTarget(
        pool=list(pool.values()),
        task=target.task(),
        base=base,
        options=TrainingOptions(shots=request.shots, seed=request.seed),
        device=request.device,
        dtype=request.dtype,
    )


def _init_of(pool: Sequence[Expert], store: Store) -> str:
    """Name the init, with its kind if the pool has several kinds of expert."""
    several = len({entry.kind for entry in store.experts.values()}) > 1
    return f"the init of the pool's most frequent kind, {pool[0].kind}" if several else "the pool's init"


def _embed(target: RankTarget, store: Store, request: RankRequest) -> None:
    """Embed the target's expert with the settings of the others, but with the number of shots asked for."""
    from pimerge.adapters.compatibility import check_expert
    from pimerge.embedding.embed_expert import embed_expert
    from pimerge.models.loading import Bases, resolve_device, resolve_dtype

    expert = target.expert
    assert expert is not None
    _refuse_namesake(target, store)
    request.note(f"{target.name} is not in the store yet: embedding it")
    like = next(iter(store.experts.values())).settings
    settings = like.model_copy(update={"shots": request.shots, "seed": request.seed}) if request.shots else like
    device = resolve_device(request.device)
    embed_expert(
        expert,
        check_expert(expert, target.task() if target.given else None),
        store,
        settings,
        Bases(device, resolve_dtype(like.dtype, device)),
        track=request.track,
    )


def _refuse_namesake(target: RankTarget, store: Store) -> None:
    if target.name in store.experts and store.folder_of(target.name).resolve() != target.folder.resolve():
        raise PimergeError(
            f"'{store.path}' has another expert named '{target.name}': {store.folder_of(target.name)}",
            "rename one of the folders",
        )
