"""Run commands as a shell does, and what their tests share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pimerge.adapters.expert import Expert, open_expert
from pimerge.cli.app import app, main
from pimerge.core.progress import Advance, Track
from tests.support.experts import MakeExpert


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty folder: ``cli("rank", "--target", "X")``; a PimergeError stays an exception."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return run


@dataclass(frozen=True)
class Finished:
    """What a command left behind: exit status, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it has to be."""
        return json.loads(self.out)


Shell = Callable[..., Finished]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Run ``pimerge`` in an empty folder as a shell does: ``shell("rank", "--target", "X").code``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["pimerge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Finished(int(ended.value.code or 0), *capfd.readouterr())

    return run


class Interrupt(KeyboardInterrupt):
    """Stands for a kill."""


def interrupted_after(steps: int | None) -> Track:
    """A progress report that kills the run after so many steps; None: when training is done."""

    @contextmanager
    def track(description: str, total: int, unit: str) -> Iterator[Advance]:
        done = 0

        def advance(step: int = 1, note: str = "") -> None:
            nonlocal done
            done += step
            if steps is not None and done >= steps:
                raise Interrupt

        yield advance
        if steps is None:
            raise Interrupt

    return track


Cli = Callable[..., Result]


NAMES = ("x", "y", "z")


def raise_from(result: Result) -> None:
    """Raise what a command raised."""
    assert result.exception is not None, result.output
    raise result.exception


SLOW = {"torch", "transformers", "peft", "datasets"}
"""What takes seconds to import."""


def printed(code: str) -> str:
    """What a fresh interpreter prints when it runs some code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Two experts ``a`` and ``b`` of one rank and one init, made once."""
    folder = tmp_path_factory.mktemp("twins") / "experts"
    for seed, name in enumerate("ab"):
        make_expert(folder / name, vit_base, parity_task, seed=seed, r=2)
    return folder


@pytest.fixture
def pair(cli: Cli, tmp_path: Path, twins: Path) -> dict[str, Expert]:
    """The twins in ./experts, opened, by name."""
    shutil.copytree(twins, tmp_path / "experts")
    return {name: open_expert(tmp_path / "experts" / name) for name in "ab"}
