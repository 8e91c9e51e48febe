"""Options that several commands share, each declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pimerge.core.plugins import Family, Option


def with_options_of(family: Family[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each option that strategies of a family have.

    They take the place of the command's parameter ``settings``, which receives name → value; None for each option
    that was not given. The family checks them (:meth:`Family.given_options`), so a wrong value ends with status 3.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = inspect.signature(command).parameters.values()
        built = _parameters(family)
        parameters = []
        for parameter in own:
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
    """The Typer option of one that a function of the library checks."""
    return typer.Option(option.flag, help=option.help, metavar="|".join(option.choices) or None)


def _parameters(family: Family[Any]) -> list[inspect.Parameter]:
    """One keyword parameter for each name of an option, with the defaults of all strategies in its help text."""
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
    """The type that Typer parses; choices stay text, so that the family refuses a wrong one."""
    typed: Any = str if issubclass(option.type, StrEnum) else option.type
    return list[typed] | None if option.repeated else typed | None


def _option(same: list[Option], defaults: dict[str, Any]) -> Any:
    """The Typer option of all options of one name, which differ in their default and range alone."""
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
"""Options of the chosen strategy, by name; see :func:`with_options_of`."""
Experts = Annotated[
    list[str] | None,
    typer.Argument(help="Experts: folders or Hub ids (org/name@revision). Default: those that the ranking selected."),
]
StorePath = Annotated[Path, typer.Option("--store", help="The store of embeddings.")]
RankingPath = Annotated[Path, typer.Option("--ranking", help="The ranking that names the target and the experts.")]
TargetReference = Annotated[
    str | None,
    typer.Option("--target", help="The target: an expert's folder, or a task's. Default: the ranking's target."),
]
BaseReference = Annotated[
    str | None, typer.Option("--base", help="Base model (folder or Hub id[@revision]), in place of the experts' own.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float64.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Shots = Annotated[int | None, typer.Option(help="Training examples per class, sampled. Default: all.")]
ClassNames = Annotated[
    bool | None,
    typer.Option(
        help="Also learn from the names of the classes, where texts are classified. Default: for guided and named, if "
        "the names predict the examples."
    ),
]
BatchTokens = Annotated[int | None, typer.Option(help="Maximum tokens per batch. Default: by device.", min=1)]
Rank = Annotated[str, typer.Option(help="Rank of the result: a number, or max (nothing is lost).")]
