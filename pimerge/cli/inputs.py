"""Values of options that are more than a plain string or number."""

from __future__ import annotations

from pimerge.core.errors import PimergeError


def parse_rank(rank: str) -> int | None:
    """``max`` is None."""
    if rank == "max":
        return None
    if not rank.isdecimal() or int(rank) < 1:
        raise PimergeError(f"--rank is '{rank}'", "expected a number from 1, max or auto")
    return int(rank)


def parse_numbers(text: str, option: str) -> list[float]:
    """Comma-separated numbers of an option."""
    import math

    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise PimergeError(f"{option} holds '{part}'", "expected numbers separated by commas, such as 0.6,0.4")
        numbers.append(number)
    return numbers
