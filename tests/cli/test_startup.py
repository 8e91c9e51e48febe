"""The command line starts fast: it imports nothing slow before a command needs it."""

from __future__ import annotations

import pytest

from pimerge.cli.app import app
from tests.support.cli import SLOW, printed

COMMANDS = [command.name for command in app.registered_commands]


def test_the_command_line_imports_nothing_slow() -> None:
    code = f"import sys\nimport pimerge.cli.app\nprint(sorted({SLOW!r} & set(sys.modules)))"
    assert printed(code) == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_nothing_slow(command: str) -> None:
    slow = SLOW | {"pydantic", "numpy"}
    code = (
        f"import sys\nfrom pimerge.cli.app import main\nsys.argv = ['pimerge', {command!r}, '--help']\n"
        f"try: main()\nexcept SystemExit: pass\nprint(sorted({slow!r} & set(sys.modules)))"
    )
    *text, imported = printed(code).splitlines()
    assert f"pimerge {command}" in "\n".join(text)
    assert imported == "[]"
