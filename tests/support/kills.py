"""Stop a process, or let the system refuse it something, at each change that it makes to the disk."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pimerge.core import placement

CHANGES = (
    *((os, name) for name in ("fsync", "mkdir", "replace", "rename", "unlink", "remove", "rmdir")),
    (placement, "_exchange"),
)
"""What changes the disk; pathlib and shutil call the functions of ``os``."""


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_change(number: int | None, act: Callable[[], None] = kill) -> count[int]:
    """From here on, act before the change of this number; the counter's next value is the number of changes."""
    numbers = count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if next(numbers) == number:
                act()
            return function(*arguments, **keywords)

        return call

    for owner, name in CHANGES:
        patch.object(owner, name, counted(getattr(owner, name))).start()
    return numbers


def killed_before(change: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a forked process that is killed before its change of this number; False if it ends before."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            at_change(change)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, "the process failed"
    return killed


def refused_at(number: int | None, code: int, folder: Path) -> count[int]:
    """From here on, the system refuses the change, the opening or the listing of this number, with an error code.

    Args:
        folder: only files below it are refused to be opened; the others are those of Python and its libraries.
    """

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    numbers, start = at_change(number, refuse), f"{folder}{os.sep}"

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes | os.PathLike):
            is_ours = os.path.abspath(os.fsdecode(arguments[0])).startswith(start)
            if is_ours and next(numbers) == number:
                refuse()

    sys.addaudithook(seen)
    return numbers


def unreadable(path: Path, code: int) -> None:
    """From here on, a file cannot be opened, with an error code."""

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        is_path = event == "open" and isinstance(arguments[0], str | bytes | os.PathLike)
        if is_path and os.path.abspath(os.fsdecode(arguments[0])) == str(path):
            raise OSError(code, os.strerror(code))

    sys.addaudithook(seen)
