"""A command that is killed before any change to the disk leaves outputs whole, and its rerun ends as if undisturbed."""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest

from pimerge.embedding.store import Store
from tests.support.fault_jobs import JOBS, STORE, Job, Tree, Workshop, part, tree
from tests.support.kills import at_change

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def is_whole(job: Job, workshop: Workshop, before: Tree, after: Tree) -> bool:
    """Whether an output is the old one or the new one; of a store, whether it has all that it names."""
    if job.outputs == STORE:
        path = workshop.folder / STORE[0]
        store = Store(path)
        return all(store.is_current(name, {}) for name in store.experts)
    found = part(tree(workshop.folder, job.timed), job.outputs)
    return len(job.outputs) > 1 or found in (part(before, job.outputs), part(after, job.outputs))


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_command_loses_nothing_and_its_rerun_ends_as_if_undisturbed(name: str, workshop: Workshop) -> None:
    job = JOBS[name]
    before, after, changes = workshop.undisturbed(job)
    assert changes > 2
    faults, points = [], workshop.points(job, changes)
    for point in points:
        workshop.lay_out(job.before)
        stopped = workshop.run(job.command, partial(at_change, point))
        if stopped.code != -9:
            faults.append((point, "was not killed", stopped.code, stopped.err[-300:]))
            continue
        if not is_whole(job, workshop, before, after):
            faults.append((point, "the output is neither old nor new"))
        again = workshop.run(job.command)
        if again.code != 0:
            faults.append((point, "the rerun fails", again.code, again.err[-300:]))
            continue
        ended = tree(workshop.folder, job.timed)
        if ended != after:
            differing = [each for each in ended.keys() | after.keys() if ended.get(each) != after.get(each)]
            faults.append((point, "the rerun leaves other files", differing))
    logging.getLogger(__name__).info("%s: %d of %d changes, %d faults", name, len(points), changes, len(faults))
    assert not faults
