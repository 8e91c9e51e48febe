"""The command ``pimerge verify``: exit status, table and JSON document."""

from __future__ import annotations

import json
from pathlib import Path

from pimerge.adapters.expert import Expert
from tests.support.cli import Cli, Shell
from tests.support.experts import set_config

TWO = ("experts/a", "experts/b")


def test_a_right_merge_exits_with_0(shell: Shell, pair: dict[str, Expert], vit_base: Path) -> None:
    assert shell("merge", *TWO, "--weights", "0.6,0.4", "--method", "interpolated", "--head", "none").code == 0
    given = ["merged", *TWO, "--weights", "0.6,0.4"]
    result = shell("verify", *given)
    assert (result.code, "Traceback" in result.err) == (0, False)
    assert "equal: 'merged' is the weighted sum that it claims to be, up to rounding" in result.out
    document = shell("verify", *given, "--json").document
    assert (document["equal"], document["verdict"], document["base"]) == (True, "equal", None)
    assert document["weights"] == [0.6, 0.4]
    assert {each["verdict"] for each in document["modules"]} == {"equal"}
    assert all(each["error"] < 1e-6 for each in document["modules"])
    into = ["--into", vit_base, "--head", "none", "-o", "full"]
    assert shell("merge", *TWO, *into).code == 0
    assert shell("verify", "full", *TWO).code == 0


def test_a_wrong_merge_exits_with_4(shell: Shell, pair: dict[str, Expert], vit_base: Path) -> None:
    assert shell("merge", *TWO, "--head", "none").code == 0
    result = shell("verify", "merged", *TWO, "--weights", "1,1")
    assert result.code == 4
    assert "in 4 of 4 modules: the updates were averaged with equal weights (found = 0.5 · claimed)" in result.out
    result = shell("verify", vit_base, *TWO, "--json")
    assert (result.code, result.document["verdict"]) == (4, "base")


def test_what_cannot_be_opened_exits_with_3(shell: Shell, pair: dict[str, Expert]) -> None:
    result = shell("verify", "gone", *TWO)
    assert (result.code, "there is no expert 'gone'" in result.err) == (3, True)
    result = shell("verify", *TWO, "--weights", "0.5,0.5")
    assert (result.code, "--weights has 2 numbers for 1 experts" in result.err) == (3, True)


def test_quiet_prints_the_verdict_only(cli: Cli, pair: dict[str, Expert]) -> None:
    set_config(Path("experts/b"), lora_alpha=3)
    result = cli("verify", "experts/b", "experts/b", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(cli("verify", "experts/b", "experts/b", "--json").stdout)["equal"]
