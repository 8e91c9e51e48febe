"""Options that several commands share, and the options of strategies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pimerge.adapters.bare_parameter import EXPERT_ORDER
from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Family, Option


def with_options_of(family: Family[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of a family's strategies to a command.

    They replace the command's parameter ``settings``, which receives name → value, with None for an option that was
    not given. The family checks the values (:meth:`Family.given_options`), so a wrong value exits with status 3.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        built = _parameters(family)
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += built
            else:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

        @wraps(command)
        def wrapper(**values: Any) -> None:
            settings = {parameter.name: values.pop(parameter.name) for parameter in built}
            command(**values, settings=settings)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorated


def of(option: Option) -> Any:
    """Return the Typer option for an option that the library checks."""
    return typer.Option(option.flag, help=option.help, metavar="|".join(option.choices) or None)


def _parameters(family: Family[Any]) -> list[inspect.Parameter]:
    """Return one keyword parameter per option name, with the defaults of all strategies in its help text."""
    defaults: dict[str, dict[str, Any]] = {}
    options: dict[str, list[Option]] = {}
    for option, found in family.options().items():
        options.setdefault(option.name, []).append(option)
        defaults.setdefault(option.name, {}).update(found)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_typed(same[0]), _option(same, defaults[name])],
        )
        for name, same in options.items()
    ]


def _typed(option: Option) -> Any:
    """Return the type that Typer parses; choices stay text, so that the family reports a wrong one."""
    typed: Any = str if issubclass(option.type, StrEnum) else option.type
    return list[typed] | None if option.repeated else typed | None


def _option(same: list[Option], defaults: dict[str, Any]) -> Any:
    """Return one Typer option for all options of one name, which differ only in their default and range."""
    by_default: dict[str, list[str]] = {}
    for strategy, value in sorted(defaults.items()):
        if value is None or value == ():
            continue  # the option's help says what happens without it
        by_default.setdefault("off" if value is False else str(value), []).append(strategy)
    shown = ", ".join(f"{value} ({', '.join(names)})" for value, names in by_default.items())
    choices = dict.fromkeys(choice for option in same for choice in option.choices)
    return typer.Option(
        same[0].flag,
        help=f"{same[0].help} Default: {shown}." if shown else same[0].help,
        metavar="|".join(choices) or None,
        show_default=False,
    )


Settings = dict[str, Any] | None
"""The options of a strategy, by name; see :func:`with_options_of`."""
Experts = Annotated[
    list[str] | None,
    typer.Argument(help="Experts: adapter folders or Hub ids (org/name@revision). Default: those selected by 'rank'."),
]
Pools = Annotated[
    list[str] | None,
    typer.Argument(help="Pools (folders of experts), single experts, or Hub ids. Default: ./experts."),
]
StorePath = Annotated[Path, typer.Option("--store", help="Embedding store, written by 'pimerge embed'.")]
RankingPath = Annotated[Path, typer.Option("--ranking", help="Ranking, written by 'pimerge rank'.")]
TargetReference = Annotated[
    str | None,
    typer.Option("--target", help="Target: folder of an expert or a task. Default: the target of the ranking."),
]
BaseReference = Annotated[
    str | None, typer.Option("--base", help="Base model: folder or Hub id. Default: the base that the experts name.")
]
ExpertOrdering = Annotated[str | None, of(EXPERT_ORDER)]
Config = Annotated[
    Path | None,
    typer.Option(
        help="adapter_config.json of adapters that are single files of PEFT or mlx-lm. Default: the one beside each."
    ),
]
AllowDisjoint = Annotated[
    bool,
    typer.Option("--allow-disjoint", help="Accept experts that adapt different modules, and so share none."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not print progress and hints.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ….")]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the model: float32, bfloat16, float64, or auto (bfloat16 on a GPU, else float32).")
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Shots = Annotated[int | None, typer.Option(help="Training examples per class, sampled at random. Default: all.")]
UpToShots = Annotated[
    bool,
    typer.Option("--up-to-shots", help="Take all examples of a class with fewer than --shots."),
]
ClassNames = Annotated[
    bool | None,
    typer.Option(
        help="Also train on the class names as examples, for text classification. Default: yes in methods that use "
        "class names, if the names predict the examples."
    ),
]
BatchTokens = Annotated[int | None, typer.Option(help="Maximum tokens per batch. Default: by device.", min=1)]


def numbers(text: str, option: str) -> list[float]:
    """Parse numbers separated by commas, the value of an option.

    >>> numbers("0.6,0.4", "--weights")
    [0.6, 0.4]
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise PimergeError(f"{option} contains '{part}'", "expected numbers separated by commas, such as 0.6,0.4")
    return found


def count(text: str, option: str, word: str = "") -> int | None:
    """Parse a positive integer, or a word that stands for None if the option has one.

    >>> count("8", "--rank", "max"), count("max", "--rank", "max")
    (8, None)
    """
    if word and text == word:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise PimergeError(f"{option} is '{text}'", "expected a positive integer" + f" or {word}" * bool(word))
    return int(text)
