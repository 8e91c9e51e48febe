"""Problems, and how they read."""

from __future__ import annotations

import pytest

from pimerge.core.errors import PimergeError, Problem, Problems, nearest


def test_one_problem_is_raised_as_itself() -> None:
    problems = Problems()
    problems.add("a is 0", "make it 1")
    with pytest.raises(PimergeError) as caught:
        problems.raise_any("several things are wrong")
    assert str(caught.value) == "a is 0\n  → make it 1"
    assert caught.value.problems == (Problem("a is 0", "make it 1"),)


def test_several_problems_come_under_a_heading_in_order() -> None:
    problems = Problems()
    problems.add("a is 0")
    problems.add("b is 0", "make it 1")
    with pytest.raises(PimergeError) as caught:
        problems.raise_any("several things are wrong")
    assert str(caught.value) == "several things are wrong\n- a is 0\n- b is 0\n  → make it 1"


def test_no_problem_raises_nothing() -> None:
    Problems().raise_any("nothing")


def test_nested_problems_keep_each_hint_and_take_the_prefix() -> None:
    inner, outer = Problems(), Problems()
    inner.add("a is 0", "make it 1")
    inner.add("b is 0")
    with outer.collected("expert 'x': "):
        inner.raise_any("inner")
    assert outer.found == [Problem("expert 'x': a is 0", "make it 1"), Problem("expert 'x': b is 0")]


def test_a_bug_is_not_collected() -> None:
    with pytest.raises(ValueError, match="a bug"), Problems().collected():
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("Unifrom", ["interpolated", "uniform"], "did you mean 'uniform'?"),
        ("UNIFORM", ["uniform"], "did you mean 'uniform'?"),
        ("parity", ["Parity"], "did you mean 'Parity'?"),
        ("zzz", ["a", "b"], "known: a, b"),
        ("zzz", [], "there is nothing to choose from"),
    ],
)
def test_nearest_names_the_name_meant(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
