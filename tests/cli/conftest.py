"""What the tests of several commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pimerge.adapters.expert import Expert, open_expert
from tests.support.cli import NAMES, Cli
from tests.support.experts import MakeExpert


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Three experts of different ranks, made once."""
    folder = tmp_path_factory.mktemp("made") / "experts"
    for i, name in enumerate(NAMES):
        make_expert(folder / name, vit_base, parity_task, seed=i, r=2 + i)
    return folder


@pytest.fixture
def pool(cli: Cli, tmp_path: Path, made: Path) -> dict[str, Expert]:
    """The three in ./experts (as deep as they were made, so that their tasks are found), opened, by name."""
    shutil.copytree(made, tmp_path / "experts")
    return {name: open_expert(tmp_path / "experts" / name) for name in NAMES}
