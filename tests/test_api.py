"""The Python API: what ``import pimerge`` offers, and what it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pimerge

FUNCTIONS = ["compare", "embed", "evaluate", "merge", "tune"]
TYPES = ["Comparison", "Evaluation", "Expert", "Merged", "PimergeError", "Ranking", "Task", "TuneResult"]


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_no_torch_and_is_fast() -> None:
    code = """
import sys, time
start = time.perf_counter()
import pimerge
seconds = time.perf_counter() - start
dir(pimerge)
print(seconds, *{"torch", "transformers", "peft", "datasets", "pydantic", "numpy"} & set(sys.modules))
"""
    seconds, *loaded = min((fresh(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert loaded == []
    assert float(seconds) < 0.1


def test_every_public_name_is_there() -> None:
    assert sorted(set(pimerge.__all__) - {"__version__"}) == sorted(FUNCTIONS + TYPES)
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


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pimerge' has no attribute 'marge'"):
        _ = pimerge.marge
    with pytest.raises(ImportError, match="cannot import name 'marge'"):
        from pimerge import marge  # noqa: F401
