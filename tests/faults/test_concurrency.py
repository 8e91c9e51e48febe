"""Commands that run at once with one output all end with status 0, and leave what one of them alone would leave."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.support.fault_jobs import JOBS, Workshop, tree
from tests.support.forks import ended, start
from tests.support.kills import at_change

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
PROCESSES = 3


@pytest.mark.parametrize("name", ["merge", "merge-file", "embed", "rank", "tune", "compare", "plot", "convert"])
def test_commands_at_once_end_as_one_alone(name: str, workshop: Workshop) -> None:
    job = JOBS[name]
    _, alone, _ = workshop.undisturbed(job, partial(at_change, None))
    workshop.lay_out(job.before)
    prints = [workshop.root / f"printed-{number}" for number in range(PROCESSES)]
    started = [start(job.command, workshop.folder, each) for each in prints]
    runs = [ended(pid, each) for pid, each in zip(started, prints, strict=True)]
    assert [run.code for run in runs] == [0] * PROCESSES, [run.err for run in runs]
    together = tree(workshop.folder, job.timed)
    assert sorted(together.keys() ^ alone.keys()) == []
    assert [file for file in alone if together[file] != alone[file]] == []
