"""Kill a process before each change that it makes to the disk, one run after the other."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

CHANGES = ((os, "fsync"), (Path, "mkdir"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"))


def killed_before(change: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a forked process that is killed before its change of this number; False if it ends before."""
    pid = os.fork()
    if pid == 0:
        numbers, code = count(), 1

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if next(numbers) == change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        try:
            for owner, name in CHANGES:
                patch.object(owner, name, counted(getattr(owner, name))).start()
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, "the process failed"
    return killed
