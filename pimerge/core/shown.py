"""Show names and texts that somebody else wrote: on a terminal, in Markdown.

A name of a folder, a tensor or a class may hold escape sequences that a terminal obeys, marks that turn the direction
of writing, and line breaks that make a second message of it.
"""

from __future__ import annotations

import json
import re

_OBEYED = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # controls, and what has no encoding
    r"\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # directions
)
_SEVERAL = re.compile(f"[{_OBEYED}]")
_ONE = re.compile(rf"[\t\n{_OBEYED}]")
_MARKS = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))")


def cleaned(text: str) -> str:
    """A text without characters that a terminal obeys; line breaks and tabs stay.

    >>> cleaned("a\\x1b[31mred")
    'a\\\\x1b[31mred'
    """
    return _SEVERAL.sub(_escaped, text)


def one_line(text: str) -> str:
    """A name without characters that a terminal obeys, line breaks and tabs among them.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    return _ONE.sub(_escaped, text)


def json_cleaned(text: str) -> str:
    r"""A JSON document with these characters as JSON escapes them, which changes none of its values.

    >>> print(json_cleaned('{"a": "\x9b31m"}'))
    {"a": "\u009b31m"}
    """
    return _SEVERAL.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "backslashreplace").decode("ascii")


def markdown(text: str) -> str:
    """A text in a line or a cell of Markdown, where none of it is markup.

    >>> markdown("a|b <img>"), markdown("run_1")
    ('a\\\\|b &lt;img&gt;', 'run_1')
    """
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\1", plain.replace("://", "&#58;//"))


def code(text: str) -> str:
    """A text as code in a line or a cell of Markdown.

    >>> code("a|b"), code("a`b")
    ('`a\\\\|b`', '`` a`b ``')
    """
    plain = one_line(text).replace("|", r"\|")
    longest = max(map(len, re.findall("`+", plain)), default=0)
    space = " " if plain[:1] == "`" or plain[-1:] == "`" or longest else ""
    return f"{'`' * (longest + 1)}{space}{plain}{space}{'`' * (longest + 1)}"
