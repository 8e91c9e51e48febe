"""Families of strategies: a folder is a registry, and each file in it ends in one typed object.

``merging/methods/ties.py`` is the merge method ``ties``: the file defines ``METHOD = MergeMethod(name="ties", …)``.
To add a strategy, add its file. Files whose names begin with an underscore hold code that several strategies share.
Importing a strategy's file does not import torch, so listings and ``--help`` stay fast.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from pimerge.core.arguments import check_number
from pimerge.core.errors import PimergeError, Problems, nearest


@dataclass(frozen=True)
class Option:
    """An option of one or more strategies of a family, each of which gives it a default.

    Attributes:
        name: the keyword argument of the strategy's function; ``label_share`` is ``--label-share``.
        type: ``float``, ``int``, ``bool``, ``str``, ``Path``, or a ``StrEnum`` whose members are the choices.
        help: one sentence for ``--help``, without the default.
        accepts: whether a value of the right type is in range.
        expected: the range in words, such as ``above 0 and at most 1``.
        typed: the option's name on the command line, if it differs from ``name``.
        repeated: whether the option can be given several times; its value is then a list.

    >>> DENSITY = Option("density", float, "Share of entries kept.", lambda x: 0 < x <= 1, "above 0 and at most 1")
    >>> DENSITY.flag, DENSITY.problem(2.0)
    ('--density', '--density must be above 0 and at most 1; got 2.0')
    """

    name: str
    type: type[float] | type[int] | type[bool] | type[str] | type[Path]
    help: str
    accepts: Callable[[Any], bool] = lambda value: True
    expected: str = ""
    typed: str = ""
    repeated: bool = False

    @property
    def flag(self) -> str:
        """The option on the command line."""
        typed = (self.typed or self.name).replace("_", "-")
        return f"--{typed}" if len(typed) > 1 else f"-{typed}"

    @property
    def choices(self) -> list[str]:
        """The accepted values of an option with choices; empty for other options."""
        members: list[StrEnum] = list(self.type) if issubclass(self.type, StrEnum) else []
        return [choice.value for choice in members if self.accepts(choice)]

    def problem(self, value: Any) -> str:
        """The problem of a value; empty if it is valid."""
        if issubclass(self.type, StrEnum):
            choices = self.choices
            return "" if value in choices else f"{self.flag} must be one of {', '.join(choices)}; got '{value}'"
        if self.type in (int, float):
            kind = numbers.Integral if self.type is int else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind):
                return f"{self.flag} must be {'an integer' if self.type is int else 'a number'}; got {value!r}"
            if expected := check_number(value):
                return f"{self.flag} must be {expected}; got {value}"
        elif self.type is not Path and not self.repeated and not isinstance(value, self.type):
            return f"{self.flag} must be of type {self.type.__name__}; got {value!r}"
        return "" if self.accepts(value) else f"{self.flag} must be {self.expected}; got {value}"


@dataclass(frozen=True, kw_only=True, eq=False)  # each is one object
class Strategy:
    """The fields that the strategies of all families have.

    Attributes:
        name: the name that the user types; its file has underscores in place of hyphens.
        summary: one line for listings and ``--help``.
        options: option → default of the strategy.
    """

    name: str
    summary: str
    options: Mapping[Option, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Name of each option → default of the strategy."""
        return {option.name: default for option, default in self.options.items()}


S = TypeVar("S", bound=Strategy)


@dataclass(frozen=True)
class Family(Generic[S]):
    """The strategies of a folder.

    Attributes:
        package: import name of the folder, such as ``pimerge.merging.methods``.
        noun: name of one strategy in messages, such as ``merge method``.
        attribute: name of the object in each file, such as ``METHOD``.
        type: class of these objects.
    """

    package: str
    noun: str
    attribute: str
    type: type[S]

    def names(self) -> list[str]:
        """The names of the strategies, in alphabetical order; no strategy is imported."""
        files = iter_modules(import_module(self.package).__path__)
        return sorted(file.name.replace("_", "-") for file in files if not file.name.startswith("_"))

    def load(self, name: str) -> S:
        """Import the strategy of a name, with hyphens or underscores; an error suggests the nearest known name."""
        name = name.replace("_", "-")
        file = f"{self.package}.{name.replace('-', '_')}"
        if (file not in sys.modules or name.startswith("-")) and name not in self.names():  # listing a folder is slow
            raise PimergeError(f"there is no {self.noun} '{name}'", nearest(name, self.names()))
        strategy = vars(import_module(file))[self.attribute]
        assert isinstance(strategy, self.type), f"{name}: {self.attribute} is a {type(strategy).__name__}"
        assert strategy.name == name, f"the file of '{name}' defines '{strategy.name}'"
        return strategy

    def __iter__(self) -> Iterator[S]:
        """All strategies, in alphabetical order."""
        return map(self.load, self.names())

    def options(self) -> dict[Option, dict[str, Any]]:
        """Each option of the family → the strategies that have it, with their defaults."""
        found: dict[Option, dict[str, Any]] = {}
        for strategy in self:
            for option, default in strategy.options.items():
                found.setdefault(option, {})[strategy.name] = default
        return found

    def given_options(self, strategy: S, values: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options given to a strategy and return them; all problems are raised at once.

        Args:
            values: name → value; None for an option that was not given.
        """
        own = {option.name: option for option in strategy.options}
        given = {name: value for name, value in values.items() if value is not None}
        problems = Problems()
        for name in sorted(given.keys() - own.keys()):
            takers = [each.name for each in self if name in each.defaults]
            flags = [option.flag for option in self.options() if option.name == name]
            problems.add(
                f"'{strategy.name}' has no option {(*flags, '--' + name.replace('_', '-'))[0]}",
                f"it is for {', '.join(takers)}" if takers else "leave it out",
            )
        for name in given.keys() & own.keys():
            if problem := own[name].problem(given[name]):
                problems.add(problem)
        problems.raise_any(f"invalid options for '{strategy.name}'")
        return given
