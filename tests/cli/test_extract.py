"""The command ``pimerge extract``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.checkpoints import shaken
from tests.support.cli import Shell


def test_the_table_the_document_and_the_exit_status(shell: Shell, bert_base: Path, tmp_path: Path) -> None:
    shaken(bert_base, tmp_path / "tuned", 1)
    given = ["extract", "tuned", "--base", bert_base, "--rank", "2"]
    result = shell(*given, "-o", "experts/x")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["module", "rank", "error", "change"]
    assert any(line.startswith("a bias") for line in lines)
    assert "→ experts/x" in result.err
    document = shell(*given, "-o", "again", "--json").document
    manifest = json.loads(Path("again/pimerge.json").read_text())
    assert manifest["command"] == "extract"
    assert manifest["results"]["truncation"] == document["error"]
    assert (Path("again/adapter_model.safetensors")).read_bytes() == Path(
        "experts/x/adapter_model.safetensors"
    ).read_bytes()
    repeated = shell(*given, "-o", "again", "--json")
    assert (repeated.code, repeated.document["truncation"]) == (0, document["error"])
    assert "'again' is there already" in repeated.err
    assert shell(*given[:-1], "1", "-o", "again").code == 3
    assert shell("inspect", "experts", "--base", bert_base).code == 0
    verified = shell("verify", "experts/x", "tuned", "--base", bert_base, "--json")
    assert (verified.code, verified.document["equal"]) == (4, False)
    assert {each["verdict"] for each in verified.document["modules"]} == {"truncated", "base", "equal"}


def test_base_is_required(shell: Shell) -> None:
    assert shell("extract", "tuned").code == 2
    result = shell("extract", "gone", "--base", "also/gone")
    assert result.code == 3
    assert "'gone'" in result.err
