"""Jinja2 templates in a sandbox, to be called by :func:`pimerge.core.confined.confined`.

The sandbox keeps a template away from Python and from files, but lets it take any time and memory: the process that
calls these functions has bounds for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from pimerge.tasks.text_columns import shown_as_json

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_ONE_EXPRESSION = re.compile(r"\s*\{\{-?((?:(?!\}\}|\{\{).)+?)-?\}\}\s*", re.DOTALL)
LONGEST = 10**7
"""Letters of a text that a template may give."""


def names_in(source: str) -> list[str]:
    """The columns that a template uses."""
    from jinja2 import meta

    _compiled(source)
    environment = _environment()
    return sorted(meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals))


def text(source: str, values: Mapping[str, Any]) -> str:
    """Fill in a template."""
    found = str(_compiled(source)[0](values))
    if len(found) > LONGEST:
        raise ValueError(f"the text has {len(found)} letters, more than {LONGEST}")
    return found


def texts(source: str, values: Mapping[str, Any]) -> list[str]:
    """One text per item if the template is a single expression that gives a list, else its only text."""
    if (value := _compiled(source)[1]) is not None:
        found = value(values)
        if isinstance(found, Sequence) and not isinstance(found, str):
            return [str(_present(item)) for item in found]
    return [text(source, values)]


@lru_cache(maxsize=256)
def _compiled(source: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """What fills in a template, and what gives its value if it is a single expression."""
    from jinja2 import TemplateSyntaxError

    environment = _environment()
    try:
        one = _ONE_EXPRESSION.fullmatch(source)
        value = environment.compile_expression(one[1], undefined_to_none=False) if one else None
        return environment.from_string(source).render, value
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from error


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, finalize=_present, keep_trailing_newline=True
    )
    # randomness would change the task at each call
    del found.globals["lipsum"], found.filters["random"]
    return found


def _present(value: Any) -> Any:
    """Refuse what has no text of its own: Python's spelling of a list or an object is none."""
    if value is None:
        raise ValueError("a value in it is null")
    if isinstance(value, Mapping):
        raise ValueError(f"a value in it is an object, {shown_as_json(value)}: name one of its fields, as in x.field")
    if isinstance(value, list | tuple | set | frozenset | Iterator):
        raise ValueError("a value in it is a list: name one of its items, as in x[0], or join them: x | join(', ')")
    if isinstance(value, bytes):
        raise ValueError("a value in it is bytes that are not UTF-8")
    return value
