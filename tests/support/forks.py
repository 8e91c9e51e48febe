"""Run commands in forks of the tests' own process: it has the libraries loaded, so a run starts at once."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import pimerge
from pimerge.cli.app import main

SLOWEST = 60
"""Seconds after which a run counts as hanging."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its status (of a signal, minus its number), what it printed, and a number that it reported."""

    code: int
    out: str
    err: str
    reported: int


def warm() -> None:
    """Import all of pimerge here, so that no fork has to."""
    for module in pkgutil.walk_packages(pimerge.__path__, "pimerge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def forked(command: str, folder: Path, prints: Path, prepare: Callable[[], object] = lambda: None) -> Ended:
    """Run a command in a folder, in a fork, and wait for it."""
    return ended(start(command, folder, prints, prepare), prints)


def start(command: str, folder: Path, prints: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Start a command in a fork; its process id.

    Args:
        prints: where its output is kept, with the suffixes ``.out`` and ``.err``.
        prepare: runs in the fork before; what it returns is called at the end for a number to report.
    """
    prints.with_suffix(".reported").unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for stream, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(prints.with_suffix(suffix), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            code = _run(command, folder, prepare, prints.with_suffix(".reported"))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(pid: int, prints: Path) -> Ended:
    """Wait for a run."""
    _, status = os.waitpid(pid, 0)
    out, err = (prints.with_suffix(suffix).read_text("utf-8", "replace") for suffix in (".out", ".err"))
    reported = prints.with_suffix(".reported")
    number = int(reported.read_text() or 0) if reported.is_file() else 0
    return Ended(os.waitstatus_to_exitcode(status), out, err, number)


def _run(command: str, folder: Path, prepare: Callable[[], object], reported: Path) -> int:
    os.chdir(folder)
    torch.set_num_threads(1)  # threads do not survive a fork
    signal.alarm(SLOWEST)
    sys.argv = ["pimerge", *shlex.split(command)]
    counter = prepare()
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    if counter is not None:
        reported.write_text(str(next(counter)))  # type: ignore[call-overload]
    return code
