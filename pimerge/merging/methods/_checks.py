"""Checks of the options, shared by the methods."""

from __future__ import annotations

from pimerge.core.errors import PimergeError


def check_share(flag: str, value: float) -> None:
    """Refuse what is not a share.

    Raises:
        PimergeError: unless 0 < value ≤ 1.

    >>> check_share("--density", 1.5)
    Traceback (most recent call last):
    pimerge.core.errors.PimergeError: --density is 1.5
      → expected a share above 0, up to 1
    """
    if not 0 < value <= 1:
        raise PimergeError(f"{flag} is {value:g}", "expected a share above 0, up to 1")
