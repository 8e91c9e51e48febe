"""Find the class that each cell of a column means.

A cell means the class whose name its text is. A column of whole numbers, none of which is a name, holds indices of the
classes from 0. Everything else is refused with the values seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pimerge.tasks.row_errors import RowProblems

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_FRACTION = re.compile(r"-?\d+\.\d+(e[-+]?\d+)?")
_MISSING = "-1"
_SHOWN = 5
SKIP = 'fill them, or leave these rows out with "skip_unlabelled": true in task.json'


def cell_texts(values: Sequence[Sequence[Any]], feature: Any, names: Sequence[str]) -> list[list[str | None]]:
    """The text of each cell of each row; None for a cell without a label.

    Args:
        values: the cells of each row.
        feature: type of a cell. The numbers of a ``ClassLabel`` mean its own names, unless none of them is in
            ``names``: then they are indices.
        names: names of the classes. A cell that is null, not a number, empty or −1 has no label unless this is a name.
    """
    own: Sequence[str] = getattr(feature, "names", None) or []
    renamed = not set(own) & set(names)
    known = frozenset(names)

    def text_of(value: Any) -> str | None:
        if isinstance(value, int) and own and not renamed and 0 <= value < len(own):
            return own[value]
        text = _text(value, known)
        return None if text in (None, "", _MISSING) and text not in known else text

    return [[text_of(value) for value in row] for row in values]


def _text(value: Any, names: frozenset[str]) -> str | None:
    if value is None or value != value:  # null, or not a number
        return None
    if isinstance(value, bool):
        return str(value) if str(value) in names else str(value).lower()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def find_classes(
    texts: Sequence[Sequence[str | None]], names: Sequence[str], problems: RowProblems, unit: str, hint: str = ""
) -> list[list[int]]:
    """The classes of each row's cells; cells that mean no class are recorded and left out.

    Args:
        unit: what has a class, for messages.
        hint: what to do about unknown labels, if it is known.
    """
    seen = {text for row in texts for text in row if text is not None}
    class_of = {name: index for index, name in enumerate(names)}
    if not seen & class_of.keys() and all(_WHOLE.fullmatch(text) for text in seen) and _are_indices(seen, names):
        class_of = {str(index): index for index in range(len(names))}
    unknown: dict[str, list[int]] = {}
    unlabelled: list[int] = []
    found: list[list[int]] = []
    for place, row in enumerate(texts):
        found.append([])
        for text in row:
            if text is None:
                unlabelled.append(place)
            elif text in class_of:
                found[-1].append(class_of[text])
            else:
                unknown.setdefault(text, []).append(place)
    if unlabelled:
        _tell(unlabelled, problems, unit, lambda rows: f"{problems.where} has no label in {rows}", SKIP)
    if unknown:
        _tell_unknown(unknown, names, problems, unit, hint)
    return found


def _are_indices(seen: set[str], names: Sequence[str]) -> bool:
    """Whether numbers can only be indices: not so if one is also the number in the name of another class."""
    numbers = {int(name): index for index, name in enumerate(names) if name.strip().lstrip("-").isdecimal()}
    return all(numbers.get(int(text), int(text)) == int(text) for text in seen)


def _tell(places: Sequence[int], problems: RowProblems, unit: str, message: Callable[[str], str], hint: str) -> None:
    rows = sorted(set(places))
    problems.add(rows, f"{message(f'{_count(places, unit)}: {problems.listed(rows)}')} (from 0)", hint)


def _count(places: Sequence[int], unit: str) -> str:
    """How many cells there are, in words.

    >>> _count([3], "words in rows")
    '1 word in rows'
    """
    counted, space, where = unit.partition(" ")
    return f"{len(places)} {counted[:-1] if len(places) == 1 else counted}{space}{where}"


def _tell_unknown(
    unknown: Mapping[str, list[int]], names: Sequence[str], problems: RowProblems, unit: str, hint: str
) -> None:
    listed = ", ".join(
        f"{value!r} ({_count(places, unit)}: {problems.listed(sorted(set(places)))}, from 0)"
        for value, places in list(unknown.items())[:_SHOWN]
    )
    more = f" and {len(unknown) - _SHOWN} other values" if len(unknown) > _SHOWN else ""
    if all(_FRACTION.fullmatch(text) for text in unknown):
        hint = "a regression is not supported: give each row a class, such as one for each range of scores"
        if all(text.endswith(".0") for text in unknown):
            hint = f"write indices of classes as whole numbers, not '1.0'; {hint}"
        problem = f"{problems.where} has numbers with fractions, which are scores, instead of classes: {listed}{more}"
    else:
        problem = f"{problems.where} has unknown labels: {listed}{more}"
    numbers = "" if any(_WHOLE.fullmatch(name) for name in names) else f", or numbers from 0 to {len(names) - 1}"
    problems.add(
        sorted({place for places in unknown.values() for place in places}),
        problem,
        hint or f"the names of the classes are {_names(names)}{numbers}",
    )


def _names(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
