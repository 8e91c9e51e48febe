"""Files, functions and lists of parameters stay short, and class names are unique in the package."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pimerge

PACKAGE = Path(pimerge.__file__).parent
FILES = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
API = {
    "embedding/embed.py: embed",
    "ranking/rank.py: rank",
    "merging/merge.py: merge",
    "merging/convert.py: convert",
    "tuning/tune.py: tune",
    "evaluation/evaluate.py: evaluate",
    "evaluation/compare.py: compare",
    "merging/verification/verify.py: verify",
    "merging/extraction/extract.py: extract",
}
LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 60
PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, str, Function]]:
    """File, ``file: name``, and the node, for each function of the package."""
    for file, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                yield file, f"{file}: {node.name}", node


def lines_of(function: Function, *, signature: bool = True) -> int:
    r"""Lines of a function without its docstring.

    Args:
        signature: whether the lines of its parameters count.

    >>> function = ast.parse("def f(\n  a, b\n):\n  'Two.'\n  return 1\n").body[0]
    >>> lines_of(function), lines_of(function, signature=False)
    (4, 1)
    """
    first, last = function.body[0], function.body[-1]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return last.end_lineno - (function.lineno if signature else first.lineno) + 1 - docstring


def parameters_of(function: Function) -> list[str]:
    """Names of a function's parameters, without the object of a method.

    >>> parameters_of(ast.parse("def f(self, a, /, b, *c, d=1, **e): ...").body[0])
    ['a', 'b', 'd', 'c', 'e']
    """
    a = function.args
    named = [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    rest = [each.arg for each in (a.vararg, a.kwarg) if each is not None]
    return [name for name in named + rest if name not in ("self", "cls")]


def test_files_are_short() -> None:
    assert {file: n for file, text in FILES.items() if (n := len(text.splitlines())) > LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    """The list of options of a command, and of the function that it calls, does not count."""
    long = {
        name: lines_of(node, signature=not (file.startswith("cli/") or name in API)) for file, name, node in functions()
    }
    assert {name: n for name, n in long.items() if n > LINES_OF_A_FUNCTION} == {}


def test_functions_have_few_parameters() -> None:
    many = {name: len(parameters_of(node)) for file, name, node in functions() if not file.startswith("cli/")}
    assert {name: n for name, n in many.items() if n > PARAMETERS and name not in API} == {}


def test_class_names_are_unique() -> None:
    names = [
        node.name for text in FILES.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
