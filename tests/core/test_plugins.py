"""The folder as a registry."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pimerge
from pimerge.core import plugins
from pimerge.core.errors import PimergeError

PACKAGES = (
    "pimerge.ranking.measures",
    "pimerge.merging.methods",
    "pimerge.tuning.methods",
    "pimerge.tasks.types",
    "pimerge.tasks.metrics",
    "pimerge.reporting.figures",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_file_is_a_strategy_with_a_summary(package: str) -> None:
    folder = Path(pimerge.__file__).parents[1].joinpath(*package.split("."))
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    found = plugins.summaries(package)
    assert list(found) == [file.stem.replace("_", "-") for file in files]
    for file, summary in zip(files, found.values(), strict=True):
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert docstring
        assert summary == docstring.splitlines()[0] != ""


@pytest.mark.parametrize("package", PACKAGES)
def test_each_strategy_loads_by_its_name(package: str) -> None:
    for name in plugins.summaries(package):
        assert plugins.load(package, name).__name__ == f"{package}.{name.replace('-', '_')}"


@pytest.mark.parametrize("name", ["unifrom", "Uniform"])
def test_an_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(PimergeError, match=f"there is no merge method '{name}'\n.*'uniform'"):
        plugins.load("pimerge.merging.methods", name)


@pytest.mark.parametrize("name", ["", "__init__", "../errors", "os"])
def test_what_is_no_strategy_is_not_imported(name: str) -> None:
    with pytest.raises(PimergeError, match="there is no measure"):
        plugins.load("pimerge.ranking.measures", name)


def test_listing_and_help_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom pimerge.core import plugins\nimport pimerge.cli.app\n"
        f"for package in {PACKAGES!r}: plugins.summaries(package)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_help_of_a_command_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom pimerge.cli.app import main\nsys.argv = ['pimerge', 'tune', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--method" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
