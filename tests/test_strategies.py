"""Each strategy is one file that ends in one typed object and imports nothing slow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import pimerge
from pimerge.core.plugins import Family
from tests.support.cli import SLOW, printed

PACKAGE = Path(pimerge.__file__).parent
FAMILIES = {
    "pimerge.adapters.formats": "pimerge.adapters.format.FORMATS",
    "pimerge.adapters.kinds": "pimerge.adapters.kind.KINDS",
    "pimerge.tasks.types": "pimerge.tasks.task_type.TASK_TYPES",
    "pimerge.tasks.metrics": "pimerge.tasks.metric.METRICS",
    "pimerge.merging.methods": "pimerge.merging.method.METHODS",
    "pimerge.tuning.methods": "pimerge.tuning.method.METHODS",
    "pimerge.ranking.measures": "pimerge.ranking.measure.MEASURES",
    "pimerge.reporting.figures": "pimerge.reporting.figure.FIGURES",
}
OTHER_MEANINGS = {"prompt", "fisher", "marginals", "experts", "history", "delta", "likelihood", "loss", "diffusers"}
"""Also a field of a task, of a log, what a measure needs, a space of merging, a way of scoring, a library."""


def family_of(package: str) -> Family[Any]:
    """The family of a folder."""
    module, _, name = FAMILIES[package].rpartition(".")
    family: Family[Any] = vars(import_module(module))[name]
    return family


@pytest.mark.parametrize("package", FAMILIES)
def test_strategies_import_nothing_slow(package: str) -> None:
    files = [file.stem for file in Path(import_module(package).__path__[0]).glob("*.py") if file.stem != "__init__"]
    assert files
    code = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {sorted(files)!r}:\n"
        f"    import_module({package!r} + '.' + name)\n"
        f"    slow = {SLOW!r} & set(sys.modules)\n"
        "    if slow: sys.exit(f'{name} imports {sorted(slow)}')"
    )
    assert printed(code) == ""


@pytest.mark.parametrize("package", FAMILIES)
def test_each_file_is_a_strategy_with_a_summary(package: str) -> None:
    family = family_of(package)
    assert family.package == package
    files = sorted(Path(import_module(package).__path__[0]).glob("[!_]*.py"))
    assert family.names() == sorted(file.stem.replace("_", "-") for file in files) != []
    for strategy in family:
        assert strategy.summary.strip(), strategy.name
        assert "\n" not in strategy.summary


@pytest.mark.parametrize("package", FAMILIES)
def test_defaults_of_options_are_in_their_range(package: str) -> None:
    for strategy in family_of(package):
        for option, default in strategy.options.items():
            if default is not None:
                assert option.problem(default) == "", f"{strategy.name} {option.flag}"


@pytest.mark.parametrize("package", FAMILIES)
def test_options_of_one_name_share_type_and_help(package: str) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for option in family_of(package).options():
        own = (option.type.__name__, option.help)
        assert seen.setdefault(option.name, own) == own, option.flag


def branches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string that a comparison or a ``case`` asks for.

    >>> list(branches(ast.parse("if name == 'ties' or name in ('a', 'b'): ...")))
    [(1, 'ties'), (1, 'a'), (1, 'b')]
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        else:
            continue
        for each in asked:
            inner = each.elts if isinstance(each, ast.Tuple | ast.List | ast.Set) else [each]
            yield from (
                (node.lineno, c.value) for c in inner if isinstance(c, ast.Constant) and isinstance(c.value, str)
            )


@pytest.mark.parametrize("package", FAMILIES)
def test_no_branch_outside_a_strategys_file_asks_for_its_name(package: str) -> None:
    """What differs between strategies is a field or a function of the object."""
    names, folder = set(family_of(package).names()), Path(import_module(package).__path__[0])
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {text}"
        for file in PACKAGE.rglob("*.py")
        for line, text in branches(ast.parse(file.read_text(encoding="utf-8")))
        if text in names - OTHER_MEANINGS and file != folder / f"{text.replace('-', '_')}.py"
    ]
    assert found == []
