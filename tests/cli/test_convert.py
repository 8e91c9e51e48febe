"""``pimerge convert`` on the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.cli import Shell
from tests.support.experts import raw_expert, updates_of


def test_pickles_become_safetensors(shell: Shell, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    done = shell("convert", "x.bin", "-o", "y.safetensors")
    assert (done.code, done.out) == (0, "1 tensors of PyTorch's pickles, now in 1 safetensors file\n")
    assert "→ y.safetensors" in done.err
    document = shell("convert", "x.bin", "-o", "y.safetensors", "--force", "--json").document
    assert document["output"] == "y.safetensors"
    assert document["size"] == 8


def test_a_rank_shows_the_error_of_each_module(shell: Shell, tmp_path: Path) -> None:
    raw_expert(tmp_path / "a", updates_of({"q": (4, 3, 5)}))
    done = shell("convert", "a", "--rank", 2, "-o", "b")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["module", "q", "all"]
    assert shell("convert", "a", "--energy", "0.5", "-o", "c", "--json").document["modules"].keys() == {"q"}


def test_problems_are_messages(shell: Shell, tmp_path: Path) -> None:
    raw_expert(tmp_path / "a", updates_of({"q": (4, 3, 5)}))
    done = shell("convert", "a", "-o", "b")
    assert done.code == 3
    assert "there is nothing to convert" in done.err
    assert shell("convert", "a", "--rank", "x", "-o", "b").code == 3
