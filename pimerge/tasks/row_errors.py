"""Errors about individual rows of a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pimerge.core.errors import PimergeError, Problem

_SHOWN = 5


def some(places: Sequence[int], most: int = _SHOWN) -> str:
    """List the first few places.

    >>> some(range(9))
    '0, 1, 2, 3, 4 …'
    """
    return ", ".join(map(str, places[:most])) + (" …" if len(places) > most else "")


def ranges(numbers: Sequence[int], most: int = _SHOWN) -> str:
    """List rising numbers, those in a row as a range; only the first few ranges.

    >>> ranges([1, 4, 5, 6, 8, 9])
    '1, 4-6, 8-9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown) + (" …" if len(runs) > most else "")


class RowsError(PimergeError):
    """An error about some rows; the other rows can still be checked.

    Attributes:
        told: each problem, with the number of the first row that has it.
        rows: numbers of all rows with a problem.
    """

    def __init__(self, where: str, told: Sequence[tuple[int, Problem]], rows: Iterable[int]) -> None:
        self.told, self.rows = list(told), frozenset(rows)
        shown = _first_of_each_sort(self.told)
        if len(told) == 1:
            super().__init__(shown[0].message, shown[0].hint)
        else:
            numbers = f" (rows {some(sorted(self.rows), 20)}, from 0), including"
            super().__init__(
                f"{len(told)} problems in {where}{numbers if len(told) > len(shown) else ''}", problems=shown
            )


def _first_of_each_sort(told: Sequence[tuple[int, Problem]]) -> list[Problem]:
    """Select a few problems in the order of their rows, at least one of each sort.

    Problems with the same hint are of the same sort.
    """
    ordered = sorted(range(len(told)), key=lambda place: told[place][0])
    first: dict[str, int] = {}
    for place in ordered:
        first.setdefault(told[place][1].hint, place)
    of_each = set(first.values())
    most = max(_SHOWN, min(len(of_each), 2 * _SHOWN))
    chosen = set(sorted(ordered, key=lambda place: place not in of_each)[:most])
    return [told[place][1] for place in ordered if place in chosen]


class RowProblems:
    """Collects the problems of individual rows; the error shows the first of each sort and their number.

    Args:
        where: description of the split, for messages.
        numbers: positions of the rows in that split.

    >>> problems = RowProblems("the train split", [0, 4])
    >>> with problems.row(1):
    ...     raise PimergeError("the answer is empty", "fill the row or leave it out")
    >>> problems.raise_any()
    Traceback (most recent call last):
    pimerge.tasks.row_errors.RowsError: row 4 (from 0) of the train split: the answer is empty
      → fill the row or leave it out
    """

    def __init__(self, where: str, numbers: Sequence[int]) -> None:
        self.where, self._numbers = where, numbers
        self.told: list[tuple[int, Problem]] = []
        self.rows: set[int] = set()

    def add(self, positions: Sequence[int], message: str, hint: str) -> None:
        """Record one problem of several rows."""
        numbers = [self._numbers[position] for position in positions]
        self.told.append((numbers[0], Problem(message, hint)))
        self.rows.update(numbers)

    def listed(self, positions: Sequence[int]) -> str:
        """List the numbers of the first few rows, whose positions rise."""
        return ranges([self._numbers[position] for position in positions])

    @contextmanager
    def row(self, position: int) -> Iterator[None]:
        """Record the problems of one row that the block raises, and continue."""
        try:
            yield
        except PimergeError as error:
            number = self._numbers[position]
            for problem in error.problems:
                message = f"row {number} (from 0) of {self.where}: {problem.message}"
                self.told.append((number, Problem(message, problem.hint)))
            self.rows.add(number)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Record the problems of rows that a block raises, and continue."""
        try:
            yield
        except RowsError as error:
            self.extend(error)

    def extend(self, error: RowsError) -> None:
        """Record the problems of an error."""
        self.told += error.told
        self.rows |= error.rows

    def raise_any(self, others: Sequence[Problem] = ()) -> None:
        """Raise all problems in one error, or return if there are none.

        Args:
            others: problems that are not about rows; if there are any, the error is not a :class:`RowsError`.
        """
        if others:
            problems = [*others, *_first_of_each_sort(self.told)]
            if len(problems) == 1:
                raise PimergeError(problems[0].message, problems[0].hint)
            raise PimergeError(f"{self.where} does not fit", problems=problems)
        if self.told:
            raise RowsError(self.where, self.told, self.rows)
