"""A folder of one-file strategies as a registry.

The folder's listing is the registry: ``merge_methods/uniform.py`` is the method ``uniform``, and the first
line of its docstring is what ``--help`` says about it. Names and summaries come without importing a file.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pimerge.errors import PimergeError, nearest


@cache
def summaries(package: str) -> dict[str, str]:
    """Name → first line of the docstring, for each strategy of a folder, in alphabetical order.

    Args:
        package: ``kinds``, ``measures``, ``merge_methods``, ``tune_methods``, ``task_types``, ``metrics`` or
            ``figures``.

    >>> list(summaries("merge_methods"))[:2]
    ['breadcrumbs', 'core-space']
    """
    found = {}
    for file in sorted((Path(__file__).parent / package).glob("[!_]*.py")):
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
        what = package.removesuffix("s").replace("_", " ")
        raise PimergeError(f"there is no {what} '{name}'", nearest(name, list(summaries(package))))
    return import_module(f"pimerge.{package}.{name.replace('-', '_')}")
