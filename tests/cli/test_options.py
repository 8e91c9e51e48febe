"""Options of a command that are built from a family's strategies."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pimerge.cli.options import with_options_of
from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Family, Option, Strategy

FILE = """
from tests.cli.test_options import BIAS, DEPTH, SHAPE, Strategy
STRATEGY = Strategy(name="{name}", summary="A strategy.", options={options})
"""


class Shape(StrEnum):
    """Choices of an option."""

    ROUND = "round"
    SQUARE = "square"


DEPTH = Option("tree_depth", float, "Depth of the tree.", lambda depth: depth > 0, "above 0")
SHAPE = Option("shape", Shape, "Shape of the leaf.", typed="leaf")
BIAS = Option("bias", bool, "Whether it has a bias.")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family[Strategy]:
    """Three strategies, of which two share an option."""
    package = tmp_path / f"strategies_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, options in {
        "ash": "{DEPTH: 2.0, SHAPE: 'round'}",
        "beech": "{DEPTH: 3.0, BIAS: False}",
        "oak": "{}",
    }.items():
        (package / f"{name}.py").write_text(FILE.format(name=name, options=options))
    monkeypatch.syspath_prepend(tmp_path)
    return Family(package.name, "tree", "STRATEGY", Strategy)


@pytest.fixture
def app(family: Family[Strategy]) -> typer.Typer:
    """A command with the options of the family between its own."""
    app = typer.Typer()

    @app.command()
    @with_options_of(family)
    def grow(name: str, settings: dict[str, Any], loud: bool = False) -> None:
        typer.echo(f"{name} {family.given_options(family.load(name), settings)} {loud}")

    return app


def test_what_is_given_reaches_the_command_by_name(app: typer.Typer) -> None:
    run = CliRunner().invoke
    assert run(app, ["ash", "--tree-depth", "4", "--leaf", "square", "--loud"]).output == (
        "ash {'tree_depth': 4.0, 'shape': 'square'} True\n"
    )
    assert run(app, ["beech", "--bias"]).output == "beech {'bias': True} False\n"
    assert run(app, ["oak"]).output == "oak {} False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ash", "--tree-depth", "0"], "--tree-depth must be above 0; got 0.0"),
        (["ash", "--leaf", "oval"], "--leaf must be one of round, square; got 'oval'"),
        (["oak", "--leaf", "round"], "'oak' has no option --leaf\n.*it is for ash"),
    ],
)
def test_what_a_strategy_cannot_take_is_refused(arguments: list[str], message: str, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, PimergeError)
    assert re.search(message, str(result.exception))


def test_the_help_names_each_default_with_its_strategies(app: typer.Typer) -> None:
    output = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["--help"]).output
    assert "Depth of the tree. Default: 2.0 (ash), 3.0 (beech)." in output
    assert re.search(r"--leaf +<?round\|square>? +Shape of the leaf. Default: round \(ash\).", output)
    assert "Default: off (beech)." in output
