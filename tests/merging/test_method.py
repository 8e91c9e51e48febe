"""A method with its options, as the stages use it."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from pimerge.cli.app import app
from pimerge.cli.options import flag
from pimerge.core import plugins
from pimerge.core.errors import PimergeError
from pimerge.merging.method import Method, open_method

NAMES = list(plugins.summaries("pimerge.merging.methods"))
F64 = torch.float64


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag that ``pimerge merge --help`` names."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["merge", "--help"])
    return set(re.findall(r"--[a-z-]+", result.output))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_method_has_a_flag(name: str, flags: set[str]) -> None:
    assert {flag(option) for option in open_method(name).resolved} <= flags


def test_flags_are_named_as_their_options() -> None:
    assert (flag("inner_method"), flag("off_diagonal")) == ("--inner", "--off-diagonal")


def test_options_that_are_none_leave_the_defaults() -> None:
    method = open_method("breadcrumbs", {"density": None, "gamma": 0.2, "common": None})
    assert method.resolved == {"density": 0.9, "gamma": 0.2, "scale": 1.0}
    assert method.options == {"gamma": 0.2}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_can_be_given_and_is_resolved(name: str) -> None:
    defaults = open_method(name).resolved
    assert open_method(name, defaults).resolved == defaults
    changed = {option: value if isinstance(value, str) else value / 2 for option, value in defaults.items()}
    assert open_method(name, changed).resolved == changed


def test_an_unknown_option_names_the_methods_that_take_it() -> None:
    with pytest.raises(PimergeError) as caught:
        open_method("uniform", {"density": 0.5, "gamma": 0.1, "nonsense_option": 1})
    said = {problem.message.partition(" has no ")[2]: problem.hint for problem in caught.value.problems}
    takers = [name for name in NAMES if "density" in open_method(name).resolved]
    assert {"ties", "magnitude", "dare-linear", "della", "breadcrumbs", "knots", "core-space"} <= set(takers)
    assert said == {
        "option --density": f"it is for {', '.join(takers)}",
        "option --gamma": "it is for breadcrumbs",
        "option --nonsense-option": "leave it out",
    }


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(PimergeError, match=r"(?s)no merge method 'tis'.*did you mean 'ties'\?"):
        open_method("tis")


def drawn(method: Method, *draws: str) -> torch.Tensor:
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
