"""The family of tune methods: a file is a method, and its options are those of the command."""

from __future__ import annotations

from pathlib import Path

import pytest

import pimerge.tuning.methods
from pimerge.core.errors import PimergeError
from pimerge.tuning.method import METHODS, open_tune_method
from tests.support.cli import Cli

SLOW_HEAD = '''"""``head`` with a learning rate of its own choice."""

from dataclasses import replace

from pimerge.core.plugins import Option
from pimerge.tuning.method import MixturePlan, TuneMethod


def fit(request, *, slowness):
    from pimerge.tuning.fit import mix_experts

    mixed, kept, held_out = mix_experts(request, METHOD)
    return mixed.result(mixed.train(kept, held_out, lr=request.options.lr / slowness), kept, held_out)


METHOD = TuneMethod(
    name="slow-head",
    summary="Train the head slowly.",
    formula="ΔW = 0",
    plan=MixturePlan(fresh=True),
    fit=fit,
    options={Option("slowness", float, "Divisor of the learning rate.", lambda x: x >= 1, "at least 1"): 10.0},
)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the file of a method."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "slow_head.py").write_text(SLOW_HEAD)
    monkeypatch.setattr(pimerge.tuning.methods, "__path__", [*pimerge.tuning.methods.__path__, str(folder)])
    return folder


@pytest.mark.usefixtures("folder")
def test_a_method_is_added_by_its_file_alone(cli: Cli, vit_base: Path, parity_task: Path, tmp_path: Path) -> None:
    assert "slow-head" in METHODS.names()
    assert open_tune_method("slow-head", {"slowness": 2.0}).defaults == {"slowness": 2.0}
    with pytest.raises(PimergeError, match="--slowness must be at least 1"):
        open_tune_method("slow-head", {"slowness": 0.5})
    listed = cli("tune", "--methods")
    assert "Train the head slowly." in listed.stdout
    given = ["--target", parity_task, "--base", vit_base, "--shots", 4, "--epochs", 1]
    result = cli("tune", "--method", "slow-head", *given, "--output", tmp_path / "tuned", "--json")
    assert result.exit_code == 0, result.stderr
    assert '"method": "slow-head"' in result.stdout


@pytest.mark.parametrize("name", METHODS.names())
def test_what_replaces_a_method_needs_no_experts_and_ends_without_names(name: str) -> None:
    instead = METHODS.load(METHODS.load(name).without_experts)
    assert not instead.plan.experts
    assert not METHODS.load(instead.without_names or instead.name).plan.class_names
