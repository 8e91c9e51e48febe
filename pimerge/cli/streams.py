"""Standard output and standard error that survive a full disk, a closed pipe and an old encoding."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF

from pimerge.core.errors import PimergeError

EXIT_BROKEN_PIPE = 141
_PLAIN = {"→": "->", "–": "-", "−": "-", "…": "...", "±": "+/-", "·": "|", "‖": "|", "×": "x"}


class Results(io.TextIOWrapper):
    """Standard output: what cannot be written ends the command, with words."""

    def write(self, text: str) -> int:
        """Write a text."""
        with self._guarded():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is kept back."""
        with self._guarded():
            super().flush()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has closed it, as in `pimerge … | head`
            self._give_up()
            raise SystemExit(EXIT_BROKEN_PIPE) from None
        except OSError as error:
            self._give_up()
            raise PimergeError(
                f"cannot write to standard output: {'it is closed' if error.errno == EBADF else error.strerror}",
                "the result is not complete there: send it to a file on a disk with free space",
            ) from error

    def _give_up(self) -> None:
        """Send the rest to nowhere, so that the interpreter does not fail on it again when it ends."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


class Remarks(Results):
    """Standard error: what cannot be written there is lost; results do not depend on it."""

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._give_up()


def prepare_streams() -> None:
    """Put guarded streams in place of the standard ones, unless a caller has put its own there."""
    codecs.register_error("pimerge", _plain)
    for number, access in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed: without this, the next file to be opened would get its number
            os.open(os.devnull, access)  # that of standard output is not writable, so that a lost result is an error
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, 1, Results)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, 2, Remarks)


def _guarded(stream: io.TextIOBase | None, number: int, kind: type[Results]) -> Results:
    """Return a guarded stream on the file of another one, which is not used any more."""
    if not isinstance(stream, io.TextIOWrapper):  # None: it was closed before pimerge started
        return kind(open(number, "wb", closefd=False), encoding="utf-8")
    encoding, by_line, at_once = stream.encoding, stream.line_buffering, stream.write_through
    return kind(stream.detach(), encoding, "pimerge", line_buffering=by_line, write_through=at_once)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding cannot express by plain characters, or by an escape sequence."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in found), error.end
