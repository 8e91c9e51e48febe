"""Each strategy is one file that ends in one typed object and imports nothing slow."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pimerge.core.plugins import Family
from tests.support.cli import SLOW, printed

FAMILIES = {
    "pimerge.adapters.kinds": "pimerge.adapters.kind.KINDS",
    "pimerge.tasks.types": "pimerge.tasks.task_type.TASK_TYPES",
    "pimerge.tasks.metrics": "pimerge.tasks.metric.METRICS",
    "pimerge.merging.methods": "pimerge.merging.method.METHODS",
    "pimerge.tuning.methods": "pimerge.tuning.method.METHODS",
    "pimerge.reporting.figures": "pimerge.reporting.figure.FIGURES",
}


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
