"""A system that refuses any change, opening or listing is named in words, and loses nothing."""

from __future__ import annotations

import errno
import logging
import os
from functools import partial

import pytest

from tests.support.fault_jobs import EMBED, JOBS, RANK, Workshop, drawn
from tests.support.kills import refused_at, unreadable

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES)
TRIED = 2
"""Points of each command in the suite."""


@pytest.mark.parametrize("name", JOBS)
def test_a_refused_command_says_so_and_its_rerun_ends_as_if_undisturbed(name: str, workshop: Workshop) -> None:
    job = JOBS[name]
    before, after, count = workshop.undisturbed(job, partial(refused_at, None, 0, workshop.folder))
    faults, points = [], drawn(job, range(count), TRIED)
    for place, point in enumerate(points):
        code = CODES[place % len(CODES)]
        where = (point, errno.errorcode[code])
        workshop.lay_out(job.before)
        refused = workshop.run(job.command, partial(refused_at, point, code, workshop.folder))
        if (
            refused.code not in (0, 3)
            or "Traceback" in refused.err
            or (refused.code == 3 and "error:" not in refused.err)
        ):
            faults.append((*where, f"ends with {refused.code}", refused.err[-600:]))
        elif job.leaves_out and refused.code == 0:
            if problem := workshop.rerun(job, after, "--force"):
                faults.append((*where, problem))
        elif not workshop.is_whole(job, before, after):
            faults.append((*where, "the output is neither old nor new"))
        elif problem := workshop.rerun(job, after):
            faults.append((*where, refused.code, problem))
    logging.getLogger(__name__).info("%s: %d of %d refusals, %d faults", name, len(points), count, len(faults))
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("command", [RANK, "plot graph -q"])
def test_an_expert_on_a_failing_disk_is_not_left_out(command: str, workshop: Workshop) -> None:
    workshop.lay_out((EMBED,))
    weights = workshop.folder / "experts" / "a" / "adapter_model.safetensors"
    refused = workshop.run(command, partial(unreadable, weights, errno.EIO))
    assert refused.code == 3
    assert "adapter_model.safetensors" in refused.err
    assert not list(workshop.folder.glob("ranking.json")) + list(workshop.folder.glob("graph.*"))
