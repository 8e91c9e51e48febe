"""The Python API: what ``import pimerge`` offers, and what it costs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import pimerge
from tests.support.cli import SLOW, printed

FUNCTIONS = ["compare", "convert", "embed", "evaluate", "extract", "merge", "rank", "tune", "verify"]
TYPES = [
    "Comparison",
    "Converted",
    "EmbedResult",
    "Evaluation",
    "Expert",
    "Extraction",
    "Merged",
    "PimergeError",
    "Ranking",
    "Task",
    "TuneResult",
    "Verification",
]


def test_import_loads_nothing_slow() -> None:
    slow = SLOW | {"pydantic", "numpy"}
    code = f"import sys, pimerge\ndir(pimerge)\nprint(sorted({slow!r} & set(sys.modules)))"
    assert printed(code) == "[]"


def test_every_public_name_is_there() -> None:
    assert sorted(set(pimerge.__all__) - {"__version__", "open_expert"}) == sorted(FUNCTIONS + TYPES)
    assert set(pimerge.__all__) <= set(dir(pimerge))
    for name in TYPES:
        assert inspect.isclass(getattr(pimerge, name)), name
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(pimerge, name)), name


def test_the_type_checker_sees_the_same_modules() -> None:
    tree = ast.parse(Path(pimerge.__file__).read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert shown == pimerge._MODULES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_and_keyword_only(name: str) -> None:
    function = getattr(pimerge, name)
    documentation = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Example"):
        assert section in documentation
    first, *rest = inspect.signature(function).parameters.values()
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {each.kind for each in rest} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    described = documentation.partition("Args:")[2].partition("Returns:")[0]
    assert [each.name for each in (first, *rest) if f"{each.name}:" not in described] == []


@pytest.mark.parametrize(
    "name", ["Comparison", "EmbedResult", "Evaluation", "Extraction", "Merged", "Ranking", "TuneResult", "Verification"]
)
def test_results_have_a_document(name: str) -> None:
    assert callable(getattr(pimerge, name).to_dict)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pimerge' has no attribute 'marge'"):
        _ = pimerge.marge
    with pytest.raises(ImportError, match="cannot import name 'marge'"):
        from pimerge import marge  # noqa: F401
