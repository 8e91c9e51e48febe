"""A command that is killed before any change to the disk leaves outputs whole, and its rerun ends as if undisturbed."""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest

from tests.support.fault_jobs import JOBS, Workshop
from tests.support.kills import at_change

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_command_loses_nothing_and_its_rerun_ends_as_if_undisturbed(name: str, workshop: Workshop) -> None:
    job = JOBS[name]
    before, after, changes = workshop.undisturbed(job, partial(at_change, None))
    assert changes > 2
    faults, points = [], workshop.points(job, changes)
    for point in points:
        workshop.lay_out(job.before)
        stopped = workshop.run(job.command, partial(at_change, point))
        if stopped.code not in (-9, 0):  # 0: the first run made one change more, such as a library's cache
            faults.append((point, "fails", stopped.code, stopped.err[-300:]))
        elif not workshop.is_whole(job, before, after):
            faults.append((point, "the output is neither old nor new"))
        elif problem := workshop.rerun(job, after):
            faults.append((point, problem))
    logging.getLogger(__name__).info("%s: %d of %d kills, %d faults", name, len(points), changes, len(faults))
    assert not faults, "\n".join(map(str, faults))
