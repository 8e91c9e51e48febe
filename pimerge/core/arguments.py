"""Check the arguments of public functions against their annotations, before anything is read.

A number must be finite and fit the tensors it is used with, and a text is not taken for a list of letters. What an
annotation does not tell, such as a range, is checked where it is known.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pimerge.core.errors import Problems
from pimerge.core.shown import one_line

LARGEST = 3.4e38
"""The largest number of float32, in which models and merges compute."""
LARGEST_SEED = 2**32 - 1
"""The largest seed that every library takes."""
_SHOWN = 80
P = ParamSpec("P")
R = TypeVar("R")


def checked_arguments(**least: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function so that arguments of a wrong type raise one PimergeError, which names all of them.

    Args:
        least: name of an argument → its smallest value.

    >>> @checked_arguments(examples=1)
    ... def embed(folder: str, examples: int = 10) -> None: ...
    >>> embed("experts", examples=0)
    Traceback (most recent call last):
    pimerge.core.errors.PimergeError: examples must be at least 1; got 0
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            declared = signature(function)
            flags = {name: _flag(name) for name, each in declared.parameters.items() if each.kind is each.KEYWORD_ONLY}
            given, names = declared.bind(*args, **kwargs).arguments, vars(sys.modules[function.__module__])
            problems = Problems()
            check_arguments(given, function.__annotations__, names, problems, least, flags)
            problems.raise_any(f"some arguments of {function.__name__} are not valid")
            return function(*args, **kwargs)

        return wrapper

    return decorated


def check_arguments(
    given: Mapping[str, Any],
    annotations: Mapping[str, Any],
    names: dict[str, Any],
    problems: Problems,
    least: Mapping[str, int] = MappingProxyType({}),
    flags: Mapping[str, str] | None = None,
) -> set[str]:
    """Collect the problems of arguments, and return the names of the wrong ones.

    Args:
        annotations: name → annotation, as text.
        names: what the annotations refer to.
        least: name → smallest value.
        flags: name → option of the command line; by default, all are options.
    """
    wrong = set()
    for name, value in given.items():
        annotation = str(annotations.get(name, "Any"))
        fits = _fits(value, _resolved(annotation, names))
        if fits and name.endswith("seed"):
            fits, annotation = 0 <= value <= LARGEST_SEED, f"an integer from 0 to {LARGEST_SEED}"
        if fits and name in least and value is not None:
            fits, annotation = value >= least[name], f"at least {least[name]}"
        if not fits:
            if isinstance(value, float):
                annotation = check_number(value) or annotation
            shown = _flag(name) if flags is None else flags.get(name, name)
            problems.add(f"{shown} must be {annotation}; got {_shown(value)}")
            wrong.add(name)
    return wrong


def check_number(value: Any) -> str:
    """The problem of a number that no computation takes; empty if there is none.

    >>> check_number(1e308)
    'a number of float32'
    """
    if isinstance(value, numbers.Integral):
        return "" if abs(int(value)) < 2**63 else "an integer of 64 bits"
    if not math.isfinite(value):
        return "a finite number"
    return "" if abs(value) <= LARGEST else "a number of float32"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _resolved(annotation: str, names: dict[str, Any]) -> Any:
    """Return what an annotation says; Any if it names what is imported for type checkers alone."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), globalns=names)["it"]
    except (NameError, TypeError, AttributeError):
        return Any


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; True where the type cannot be checked."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is not None:
        return _fits_container(value, kind, parts)
    if hint is NoneType or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool"  # that of numpy
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and not check_number(value)
    if hint is Path:
        return isinstance(value, os.PathLike)
    if hint is str:
        return isinstance(value, str)
    checkable = isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False)
    return not checkable or isinstance(value, hint)


def _fits_container(value: Any, kind: Any, parts: Sequence[Any]) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, Iterable):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0]) and _fits(each, parts[1]) for key, each in value.items()
        )
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return False
    return not isinstance(value, Sequence) or all(_fits(each, parts[0]) for each in value)
