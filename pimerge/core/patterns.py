"""Match regular expressions from configs of somebody else, in bounded time.

Lists of plain names, with one wildcard at most, are matched here; all others in a process with a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pimerge.core.confined import confined
from pimerge.core.errors import PimergeError

_NAME = r"(?:[\w-]|\\[.\w-](?<!\\[1-9a-zA-Z])|\.)*"
_PLAIN = re.compile(rf"\^?{_NAME}(?:\|{_NAME})*\$?")
_WILD = re.compile(rf"\^?{_NAME}(?:\.[*+]\??|\\d\+)?{_NAME}(?:\((?:\?:)?{_NAME}(?:\|{_NAME})*\))?{_NAME}\$?")
_LONGEST = 400  # letters of a pattern or a name that is matched here
_WITHIN = r"(?:$|\..*)"
_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules")  # regular expressions if they are text
_ENDINGS = ("rank_pattern", "alpha_pattern")


def matches(pattern: str, name: str, ending: bool = False) -> bool:
    """Whether a regular expression matches a whole name.

    Args:
        ending: whether it may match what follows a dot in the name, as PEFT matches ``rank_pattern``.

    >>> matches(r".*\\.(q|v)", "h.0.q"), matches("q", "h.0.q"), matches("q", "h.0.q", ending=True)
    (True, False, True)
    """
    simple = (_PLAIN if ending else _WILD).fullmatch(pattern) is not None
    if simple and len(pattern) <= _LONGEST and len(name) <= _LONGEST:
        return bool(matching(pattern, (name,), ending))
    return _confined(pattern, name, ending)


def is_within(saved: str, name: str) -> bool:
    """Whether a name is that of a module of ``modules_to_save`` or lies in it, as PEFT matches it.

    >>> is_within("head", "model.head.0"), is_within("head", "model.heads")
    (True, False)
    """
    pattern = f"(?:{saved}){_WITHIN}"
    if _PLAIN.fullmatch(saved) and max(len(saved), len(name)) <= _LONGEST:
        return bool(_compiled(pattern, True).match(name))
    return matches(pattern, name, ending=True)


@lru_cache(maxsize=2**16)
def _confined(pattern: str, name: str, ending: bool) -> bool:
    return bool(_indices(pattern, (name,), ending))


@lru_cache(maxsize=256)
def _indices(pattern: str, names: tuple[str, ...], ending: bool) -> Sequence[int]:
    try:
        found: list[int] = confined("pimerge.core.patterns:matching", pattern, names, ending)
    except PimergeError as error:
        problem = error.problems[0]
        raise PimergeError(
            f"the regular expression '{pattern[:200]}' cannot be used: {problem.message}",
            problem.hint or "correct it in adapter_config.json",
        ) from None
    return found


def matching(pattern: str, names: Sequence[str], ending: bool = False) -> list[int]:
    """The indices of the names that match, without a limit of time."""
    compiled = _compiled(pattern, ending)
    match = compiled.match if ending else compiled.fullmatch
    return [index for index, name in enumerate(names) if match(name)]


@lru_cache(maxsize=1024)
def _compiled(pattern: str, ending: bool) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$" if ending else pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PimergeError(f"'{pattern[:200]}' is not a regular expression ({error})") from error


def require_bounded(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Match every regular expression of an adapter's config once, before PEFT matches it without a limit of time.

    Args:
        config: the content of ``adapter_config.json``.
        names: the names that PEFT matches: those of the modules of the base.
    """
    wanted: dict[tuple[str, bool], None] = {}
    for field, value in config.items():
        if field in _FIELDS and isinstance(value, str):
            wanted[value, False] = None
        elif field in _ENDINGS or (field.endswith("_pattern") and isinstance(value, Mapping)):
            wanted |= {(str(key), True): None for key in value or ()}
        elif field in ("modules_to_save", "layers_pattern"):
            listed = [value] if isinstance(value, str) else value or ()
            after = _WITHIN if field == "modules_to_save" else ".*"
            wanted |= {(f"(?:{each}){after}", True): None for each in listed if not _PLAIN.fullmatch(str(each))}
    every = tuple(names)
    for pattern, ending in wanted:
        if not _PLAIN.fullmatch(pattern) or len(pattern) > _LONGEST:
            _indices(pattern, every, ending)
