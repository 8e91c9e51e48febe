"""The one exception that users see as a message.

Every public function of pimerge raises :class:`PimergeError` if its input is invalid: a missing or damaged file,
contradictory options, experts of different bases, a full disk. Docstrings do not repeat this. Any other exception is a
bug.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_FAILING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}


@dataclass(frozen=True)
class Problem:
    """One problem of an input: what was found and expected, and what to do about it."""

    message: str
    hint: str = ""


class PimergeError(Exception):
    """An error that the user can fix; a command exits with status 3 and prints no traceback.

    It carries every problem of the input, not only the first one.

    >>> raise PimergeError("found no experts in './experts'", "name the folder that holds them")
    Traceback (most recent call last):
    pimerge.core.errors.PimergeError: found no experts in './experts'
      → name the folder that holds them
    """

    def __init__(self, message: str, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems) or (Problem(message, hint),)
        self.heading = message if problems else ""
        lines = [self.heading] if self.heading else []
        for problem in self.problems:
            lines.append(f"- {problem.message}" if self.heading else problem.message)
            if problem.hint:
                lines.append(f"  → {problem.hint}")
        super().__init__("\n".join(lines))

    def raise_if_disk_fails(self) -> None:
        """Raise this error again if a file could not be read though nothing is wrong with it.

        Whoever leaves out what has a problem asks this first: the same command would give another result tomorrow.
        """
        if isinstance(self.__cause__, OSError) and self.__cause__.errno in _FAILING:
            raise self


class AlreadyDone(PimergeError):
    """The output is there, complete, from an earlier run of the same request.

    For the command line this is not an error: a script can run a command again after a stop.
    """

    def __init__(self, output: Path, results: dict[str, Any] | None = None) -> None:
        super().__init__(
            f"'{output}' is there already: the same command wrote it, from the same inputs", "pass --force to redo it"
        )
        self.document = {"output": str(output), **(results or {})}


class Problems:
    """Collect the problems of one input and report them all at once.

    >>> problems = Problems()
    >>> problems.add("rank is 0, expected at least 1")
    >>> with problems.collected("expert 'a': "):
    ...     raise PimergeError("alpha is missing")
    >>> problems.raise_any("2 problems")
    Traceback (most recent call last):
    pimerge.core.errors.PimergeError: 2 problems
    - rank is 0, expected at least 1
    - expert 'a': alpha is missing
    """

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self._cause: BaseException | None = None

    def add(self, message: str, hint: str = "") -> None:
        """Add one problem."""
        self.found.append(Problem(message, hint))

    def extend(self, problems: Sequence[Problem], prefix: str = "") -> None:
        """Add several problems, each under the same prefix."""
        self.found += [Problem(prefix + problem.message, problem.hint) for problem in problems]

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """Collect the problems of a PimergeError that the block raises, and continue after the block."""
        try:
            yield
        except PimergeError as error:
            self.extend(error.problems, prefix)
            self._cause = self._cause or error.__cause__

    def raise_any(self, heading: str) -> None:
        """Raise all problems in one PimergeError, or return if there are none."""
        if len(self.found) == 1:
            raise PimergeError(self.found[0].message, self.found[0].hint) from self._cause
        if self.found:
            raise PimergeError(heading, problems=self.found) from self._cause


@contextmanager
def passed_over() -> Iterator[None]:
    """Pass over a PimergeError, unless a disk fails."""
    try:
        yield
    except PimergeError as error:
        error.raise_if_disk_fails()


def nearest(name: str, known: Sequence[str]) -> str:
    """Suggest the known name closest to a misspelt one, or list all of them.

    >>> nearest("partiy", ["parity", "loop"])
    "did you mean 'parity'?"
    >>> nearest("zzz", ["parity", "loop"])
    'known: parity, loop'
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    match = get_close_matches(name.lower(), list(by_lower), n=1)
    if match:
        return f"did you mean '{by_lower[match[0]]}'?"
    return "known: " + ", ".join(known) if known else "there is nothing to choose from"
