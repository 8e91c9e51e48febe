"""A folder of one-file strategies as a registry.

The folder's listing is the registry: ``merge_methods/uniform.py`` is the method ``uniform``, and the first
line of its docstring is what ``--help`` says about it. Names and summaries come without importing a file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pimerge.core.errors import PimergeError, Problems, nearest

_NOUNS = {
    "pimerge.adapters.kinds": "kind",
    "pimerge.tasks.types": "task type",
    "pimerge.tasks.metrics": "metric",
    "pimerge.ranking.measures": "measure",
    "pimerge.merging.methods": "merge method",
    "pimerge.tuning.methods": "tune method",
    "pimerge.reporting.figures": "figure",
}


@cache
def summaries(package: str) -> dict[str, str]:
    """Name → first line of the docstring, for each strategy of a folder, in alphabetical order.

    Args:
        package: the import name of the folder, such as ``pimerge.merging.methods``.

    >>> list(summaries("pimerge.merging.methods"))[:2]
    ['breadcrumbs', 'core-space']
    """
    found = {}
    folder = Path(__file__).parents[1].joinpath(*package.split(".")[1:])
    for file in sorted(folder.glob("[!_]*.py")):
        # every strategy begins with its docstring: its first line is read, nothing is parsed
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        found[file.stem.replace("_", "-")] = first.strip('"')
    return found


def load(package: str, name: str) -> ModuleType:
    """Import one strategy; underscores in its name are hyphens.

    Raises:
        PimergeError: if there is none of that name; the nearest name is suggested.
    """
    name = name.replace("_", "-")
    if name not in summaries(package):
        what = _NOUNS[package]
        raise PimergeError(f"there is no {what} '{name}'", nearest(name, list(summaries(package))))
    return import_module(f"{package}.{name.replace('-', '_')}")


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Name → default of the keyword-only arguments that have one: the options of a strategy.

    >>> def merge(deltas, weights, *, density=0.2, fishers): ...
    >>> keyword_defaults(merge)
    {'density': 0.2}
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }


def given_options(
    package: str, name: str, options: Mapping[str, Any] | None, defaults: Callable[[ModuleType], Mapping[str, Any]]
) -> dict[str, Any]:
    """The options that were given, each of which the strategy has to take.

    Args:
        options: name → value; None for one that was not given.
        defaults: of a strategy's file, by option.

    Raises:
        PimergeError: with each option that it does not take, and who does, and each that is no number.
    """
    known = defaults(load(package, name))
    given = {option: value for option, value in (options or {}).items() if value is not None}
    problems = Problems()
    for option in sorted(given.keys() - known.keys()):
        takers = [other for other in summaries(package) if option in defaults(load(package, other))]
        problems.add(
            f"'{name}' has no option --{option.replace('_', '-')}",
            f"it is for {', '.join(takers)}" if takers else "leave it out",
        )
    for option, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.add(f"--{option.replace('_', '-')} is {value}", "expected a number")
    problems.raise_any(f"options that '{name}' cannot take")
    return given
