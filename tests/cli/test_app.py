"""The command ``pimerge`` itself: exit codes and help."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import typer

from pimerge.cli import app
from pimerge.core.errors import PimergeError


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (PimergeError("it does not fit", "leave it out"), 3, "error: it does not fit\n  → leave it out\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
    ],
)
def test_what_ends_a_command_decides_the_exit_code(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise raised

    monkeypatch.setattr(app, "app", run)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(app, "app", typer.main.get_command(typer_app(run)))
    monkeypatch.setattr(sys, "argv", ["pimerge"])
    with pytest.raises(ValueError, match="a bug"):
        app.main()


def typer_app(command: Any) -> typer.Typer:
    """A command line of one command, as ``pimerge`` is set up."""
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(lambda: command())
    return made


def test_the_paragraphs_of_a_help_text_are_not_broken_into_lines() -> None:
    for command in app.app.registered_commands:
        assert command.help
        assert "\n" not in command.help.replace("\n\n", "")
