"""The benchmark of large models: its shapes match the real models, and it prints its table for tiny ones."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "large_models.py"
SMALL = ["--examples", "12", "--length", "6", "--answer", "2", "--batch-size", "4", "--batch-tokens", "32"]


# those of google/flan-t5-large (without its lm_head: a T5 without a checkpoint has one vocabulary) and of Llama-2-7b
@pytest.mark.parametrize(
    ("shape", "parameters"), [("flan-t5-large", 783_150_080 - 32_128 * 1024), ("7b", 6_738_415_616)]
)
def test_its_shapes_have_as_many_parameters_as_the_real_models(shape: str, parameters: int) -> None:
    _, model, config, modules = runpy.run_path(str(SCRIPT))["SHAPES"][shape]
    with torch.device("meta"):
        made = model(config)
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    assert {name.rpartition(".")[2] for name, _ in made.named_modules()} > set(modules)


def test_it_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--shape", "tiny", "tiny-causal", "--device", "cpu", *SMALL])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["tiny"] * 3 + ["tiny-causal"] * 3
    assert [" ".join(row[3:-4]) for row in rows[:3]] == ["tune scratch", "tune learned, 3 experts", "embed, rules"]
    for row in rows:
        rate, tokens, memory = float(row[-4]), float(row[-3]), float(row[-2])
        assert rate > 0
        assert tokens == pytest.approx(8 * rate, rel=0.02, abs=1)
        assert 0 < memory < 100
