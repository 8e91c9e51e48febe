"""A method with its options, as the stages use it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pimerge.adapters.expert import open_expert
from pimerge.cli.app import app
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, OpenedMethod, open_method
from tests.support.experts import dense_deltas, raw_expert, updates_of

NAMES = METHODS.names()
F64 = torch.float64


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag that ``pimerge merge --help`` names."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["merge", "--help"])
    return set(re.findall(r"--[a-z-]+", result.output))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_method_has_a_flag(name: str, flags: set[str]) -> None:
    assert {option.flag for option in METHODS.load(name).options} <= flags


def test_options_that_are_none_leave_the_defaults() -> None:
    method = open_method("breadcrumbs", {"density": None, "gamma": 0.2, "common": None})
    assert method.options == {"density": 0.9, "gamma": 0.2, "scale": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_can_be_given_and_is_resolved(name: str) -> None:
    defaults = open_method(name).options
    assert open_method(name, defaults).options == defaults
    changed = {option: value if isinstance(value, str) else value / 2 for option, value in defaults.items()}
    assert open_method(name, changed).options == changed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(("ties", {"density": x}, f"--density must be above 0 and at most 1; got {x}") for x in (0.0, 1.5, -0.1)),
        ("ties", {"density": math.nan}, "--density must be a finite number; got nan"),
        *(("breadcrumbs", {"gamma": x}, f"--gamma must be at least 0 and below 1; got {x}") for x in (-0.1, 1.0)),
        ("iso-cts", {"common": 1.1}, "--common must be above 0"),
        ("fisher", {"floor": -1.0}, "--floor must be at least 0; got -1.0"),
        ("regmean", {"offdiagonal": 1.5}, "--offdiagonal must be at least 0 and at most 1"),
        ("knots", {"inner_method": "tsv"}, "--inner must be one of ties, linear; got 'tsv'"),
        ("core-space", {"inner_method": "iso"}, "--inner must be one of ties, linear, tsv, iso-c; got 'iso'"),
        ("della", {"epsilon": -0.1}, "--epsilon must be at least 0"),
        ("della", {"density": 0.1}, r"--epsilon is 0\.1 at --density 0\.1\n.*0 < density ± epsilon ≤ 1"),
        ("della", {"density": 0.95, "epsilon": 0.2}, r"--epsilon is 0\.2 at --density 0\.95"),
    ],
)
def test_an_option_out_of_range_is_refused_when_the_method_is_opened(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PimergeError, match=message):
        open_method(name, options)


def test_an_unknown_option_names_the_methods_that_take_it() -> None:
    with pytest.raises(PimergeError) as caught:
        open_method("uniform", {"density": 0.5, "gamma": 0.1, "nonsense_option": 1})
    said = {problem.message.partition(" has no ")[2]: problem.hint for problem in caught.value.problems}
    takers = [name for name in NAMES if "density" in open_method(name).options]
    assert {"ties", "magnitude", "dare-linear", "della", "breadcrumbs", "knots", "core-space"} <= set(takers)
    assert said == {
        "option --density": f"it is for {', '.join(takers)}",
        "option --gamma": "it is for breadcrumbs",
        "option --nonsense-option": "leave it out",
    }


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(PimergeError, match=r"(?s)no merge method 'tis'.*did you mean 'ties'\?"):
        open_method("tis")


def drawn(method: OpenedMethod, *draws: str) -> torch.Tensor:
    """What dare-linear keeps of updates of ones, expert by expert."""
    count = len(draws)
    kept = [
        method.merge(torch.ones(count, 500, dtype=F64), row, draws=draws)
        for row in torch.eye(count, dtype=F64).unbind()
    ]
    return torch.stack(kept)


def test_draws_depend_on_the_seed_and_on_the_experts_text_alone() -> None:
    method, other = open_method("dare-linear", seed=1), open_method("dare-linear", seed=2)
    first = drawn(method, "a q", "b q")
    assert torch.equal(first, drawn(open_method("dare-linear", seed=1), "a q", "b q"))
    assert torch.equal(first.flip(0), drawn(method, "b q", "a q"))  # not on the order
    assert torch.equal(first[:1], drawn(method, "a q"))  # nor on the number
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, drawn(method, "a v", "b v"))
    assert not torch.equal(first, drawn(other, "a q", "b q"))


@pytest.mark.parametrize("seed", [0, -1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    kept = drawn(open_method("dare-linear", {"density": 0.25}, seed), "a q")
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert 0.15 < float((kept > 0).double().mean()) < 0.35


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    drawn(open_method("dare-linear"), "a q")
    assert torch.equal(before, torch.get_rng_state())


def test_a_linear_method_is_given_inner_products_only_if_it_needs_them() -> None:
    def never() -> torch.Tensor:
        raise AssertionError

    weights = torch.tensor([0.5, 0.5], dtype=F64)
    assert torch.equal(open_method("uniform").coefficients(weights, never), weights)
    assert torch.equal(open_method("task-arithmetic", {"scale": 3.0}).coefficients(weights, never), 3 * weights)
    found = open_method("slerp").coefficients(weights, lambda: torch.eye(2, dtype=F64))
    torch.testing.assert_close(found, torch.full((2,), 0.5**0.5, dtype=F64))


NEW = '''
"""The negated mean."""

from pimerge.core.plugins import Option
from pimerge.merging.method import MergeMethod, Space

PUSH = Option("push", float, "How far to push.", lambda push: push > 0, "above 0")


def coefficients(weights, *, push=2.0):
    return -push * weights


METHOD = MergeMethod(
    name="push-away",
    summary="The negated mean.",
    formula="ΔW = −push · Σ w_n ΔW_n",
    paper="this test",
    space=Space.LINEAR,
    coefficients=coefficients,
    options={PUSH: 2.0},
)
'''


def test_a_file_is_all_that_a_new_method_needs(tmp_path: Path) -> None:
    methods = tmp_path / "methods"
    methods.mkdir()
    (methods / "push_away.py").write_text(NEW)
    for seed, name in enumerate("ab"):
        raw_expert(tmp_path / name, updates_of({"q": (5, 2, 4)}, seed))

    def run(*arguments: str) -> str:
        code = f"""
import sys, pimerge.merging.methods as methods
methods.__path__.append({str(methods)!r})
from pimerge.cli.app import main
sys.argv = ["pimerge", "merge", *{arguments!r}]
main()
"""
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment, encoding="utf-8"
        ).stdout

    assert re.search(r"--push +<float> +How far to push\. Default: 2\.0 \(push-away\)\.", run("--help"))
    assert "push-away" in run("--help")
    assert re.search(
        r"push-away +The negated mean\. +ΔW = −push · Σ w_n ΔW_n +this test +--push 2\.0", run("--methods")
    )
    run("a", "b", "--method", "push-away", "--push", "3", "-q")
    a, b, found = (dense_deltas(open_expert(tmp_path / name))["q"] for name in ("a", "b", "merged"))
    torch.testing.assert_close(found, -1.5 * (a + b), rtol=0, atol=1e-6)
