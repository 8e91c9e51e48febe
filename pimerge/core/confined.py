"""Run what somebody else wrote, such as a pattern or a template, in a process with bounded time and memory.

A regular expression can take longer than the age of the universe for a name of thirty letters, and neither Python's
``re`` nor Jinja2 can be interrupted from a thread. One process is started when it is first needed, and serves every
later call; a call that exceeds a bound ends it, and the next one starts another.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from pimerge.core.errors import PimergeError

SECONDS = 4.0
"""Processor time of one call."""
_WALL = 120  # seconds, for a machine whose processors are busy
MEMORY = 2**30
"""Bytes that one call may take."""
_SIZE = struct.Struct("<Q")
_LOCK = threading.RLock()


class _Worker:
    """The process, for the process that started it: a fork must not share its pipes."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        code = "from pimerge.core.confined import serve; serve()"
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, request: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        _send(self.process.stdin, pickle.dumps(request))
        if os.name == "posix":  # elsewhere there is no select for pipes
            ready, _, _ = select.select([self.process.stdout], [], [], _WALL)
            if not ready:
                raise EOFError
        return json.loads(_received(self.process.stdout))

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]


_worker: _Worker | None = None


def confined(function: str, *arguments: Any) -> Any:
    """Call a function of pimerge in the process, and return what it returns as JSON gives it back.

    Args:
        function: ``module:name``. A ``ValueError`` that it raises becomes a PimergeError.

    >>> confined("pimerge.core.patterns:matching", "a+b", ["aab", "b"])
    [0]
    """
    global _worker
    with _LOCK:
        if _worker is None or _worker.owner != os.getpid():
            _worker = _Worker()
        try:
            kind, answer = _worker.ask((function, arguments, SECONDS))
        except (EOFError, OSError):
            _worker.close()
            _worker = None
            raise PimergeError(
                f"it takes more than {SECONDS:g} seconds or too much memory", "write it simpler"
            ) from None
    if kind == "error":
        raise PimergeError(answer)
    return answer


def _close() -> None:
    if _worker is not None:
        _worker.close()


atexit.register(_close)


def serve() -> None:
    """Answer calls on standard input until it ends: the program of the process."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.setrecursionlimit(600)
    while True:
        try:
            function, arguments, seconds = pickle.loads(_received(requests))
        except EOFError:
            return
        module, _, name = function.partition(":")
        call = vars(importlib.import_module(module))[name]
        _bound(seconds)
        try:
            answer = ("value", call(*arguments))
            content = json.dumps(answer).encode()
        except (MemoryError, RecursionError) as error:
            content = json.dumps(("error", f"it is too large or too deep ({type(error).__name__})")).encode()
        except Exception as error:  # a user's template can raise any error
            content = json.dumps(("error", str(error)[:1000] or type(error).__name__)).encode()
        _bound(0)
        _send(answers, content)


def _bound(seconds: float) -> None:
    """Let the system end this process after so much processor time; 0 for none. Windows has no such bound."""
    with suppress(ImportError, AttributeError, ValueError, OSError):
        import resource
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(_SIZE.pack(len(content)) + content)
    pipe.flush()


def _received(pipe: IO[bytes]) -> bytes:
    def part(size: int) -> bytes:
        content = pipe.read(size)
        if len(content) < size:
            raise EOFError
        return content

    return part(_SIZE.unpack(part(_SIZE.size))[0])
