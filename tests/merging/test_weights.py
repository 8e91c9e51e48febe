"""Weights by expert and module: rules, globs and files."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.core.errors import PimergeError
from pimerge.merging.weights import Rule, by_module, parse_rule, parse_rules, rules_of
from tests.support.numerics import small

MODULES = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.10.v_proj"]
FILE = Path("w.json")


@dataclass(frozen=True)
class Expert:
    """As much of an expert as rules know."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name


A, B = Expert(Path("experts/parity")), Expert(Path("experts/loop"))


def weigh(*rules: str, start: list[float] | None = None) -> dict[str, list[float]]:
    """The weights of A and B."""
    return by_module(MODULES, [A, B], ["experts/parity", "./experts/loop"], start, parse_rules(rules))


@pytest.mark.parametrize(
    ("text", "expert", "glob", "weight"),
    [
        ("a=0.5", "a", "*", 0.5),
        ("a=-1e-3", "a", "*", -1e-3),
        ("experts/a:*.layers.1?.*=0.7", "experts/a", "*.layers.1?.*", 0.7),
        ("org/name@main:*q=2", "org/name@main", "*q", 2.0),
        ("a=b=3", "a=b", "*", 3.0),
        ("a:x:y=1", "a", "x:y", 1.0),
        ("a: = 1 ", "a", " ", 1.0),
    ],
)
def test_a_rule_is_an_expert_a_glob_and_a_number(text: str, expert: str, glob: str, weight: float) -> None:
    assert parse_rule(text) == Rule(expert, glob, weight, text)


@pytest.mark.parametrize("text", ["", "a", "=1", "a=", "a=x", "a=nan", "a=inf", "a:=1", ":*=1", "a=0,5", "a:*"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(PimergeError, match="expected EXPERT=NUMBER or EXPERT:GLOB=NUMBER"):
        parse_rule(text)


def test_all_bad_rules_are_said_at_once() -> None:
    with pytest.raises(PimergeError) as caught:
        parse_rules(["a=1", "b", "c=nan"])
    assert [problem.message for problem in caught.value.problems] == ["--weight is 'b'", "--weight is 'c=nan'"]


def test_experts_go_by_name_path_or_as_they_were_given() -> None:
    for parity, loop in (("parity", "loop"), ("experts/parity", "experts/loop"), ("parity", "./experts/loop")):
        assert weigh(f"{parity}=1", f"{loop}=2") == {module: [1.0, 2.0] for module in MODULES}


def test_globs_choose_modules_and_the_start_serves_the_others() -> None:
    found = weigh("parity:*q_proj=3", "loop:layers.1?.*=0", start=[0.5, 0.25])
    assert list(found.values()) == [[3.0, 0.25], [0.5, 0.25], [3.0, 0.25], [0.5, 0.0]]


def test_the_last_rule_that_matches_wins() -> None:
    assert weigh("parity:*q_proj=3", "parity=1", start=[0, 0])["layers.0.q_proj"] == [1, 0]
    assert weigh("parity=1", "parity:*q_proj=3", start=[0, 0])["layers.0.q_proj"] == [3, 0]


def test_globs_tell_upper_from_lower_case() -> None:
    with pytest.raises(PimergeError, match="no module matches"):
        weigh("parity:*Q_PROJ=3", start=[0, 0])


def test_two_experts_of_one_name_share_a_rule() -> None:
    twins = [Expert(Path("x/a")), Expert(Path("y/a"))]
    rules = parse_rules(["a=1", "y/a=2"])
    assert by_module(["q"], twins, ["x/a", "y/a"], None, rules) == {"q": [1.0, 2.0]}


def test_every_problem_of_the_rules_is_said_at_once() -> None:
    with pytest.raises(PimergeError) as caught:
        weigh("partiy=1", "loop:*k_proj=1", "zzz:*nothing=2")
    said = [problem.message for problem in caught.value.problems]
    assert said == [
        "'partiy=1' names an unknown expert 'partiy'",
        "'loop:*k_proj=1': no module matches '*k_proj'",
        "'zzz:*nothing=2' names an unknown expert 'zzz'",
        "'zzz:*nothing=2': no module matches '*nothing'",
    ]
    hints = [problem.hint for problem in caught.value.problems]
    assert hints[:2] == ["did you mean 'parity'?", "the modules are named like 'layers.0.q_proj'"]


def test_a_weight_that_is_missing_is_named_with_its_module() -> None:
    with pytest.raises(PimergeError) as caught:
        weigh("parity=1", "loop:layers.0.*=1")
    assert "'loop' has no weight in 2 of 4 modules, such as 'layers.1.q_proj'" in str(caught.value)
    assert "add --weight 'loop=NUMBER' before the other rules" in str(caught.value)
    with pytest.raises(PimergeError, match=r"(?s)'parity' has no weight in 4.*'loop' has no weight in 4"):
        weigh()


@pytest.mark.parametrize("weight", [True, None, "1", [1.0], float("nan"), float("inf")])
def test_a_file_holds_numbers_only(weight: Any) -> None:
    with pytest.raises(PimergeError, match="the weight of 'a' in 'q' is"):
        rules_of({"a": {"q": weight}}, FILE)
    with pytest.raises(PimergeError, match=r"the weight of 'a' in '\*' is"):
        rules_of({"a": weight}, FILE)


@pytest.mark.parametrize("document", [[1.0, 2.0], 3, None, "a"])
def test_a_file_that_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(PimergeError, match=r"'w\.json'"):
        rules_of(document, FILE)


def test_all_problems_of_a_file_are_said_at_once() -> None:
    with pytest.raises(PimergeError) as caught:
        rules_of({"a": True, "b": {"q": 1, "v": None}, "c": 2}, FILE)
    assert [problem.message.partition(": ")[2] for problem in caught.value.problems] == [
        "the weight of 'a' in '*' is True",
        "the weight of 'b' in 'v' is None",
    ]


PATTERNS = st.sampled_from(["*", "*q_proj", "layers.0.*", "layers.?.*", "*v*", "layers.1[0]*"])
RULES = st.lists(st.tuples(st.sampled_from(["parity", "loop"]), PATTERNS, st.integers(-3, 3)), max_size=6)


@small
@given(RULES)
def test_rules_and_a_slow_reference_agree(rules: list[tuple[str, str, int]]) -> None:
    found = weigh(*(f"{name}:{glob}={weight}" for name, glob, weight in rules), start=[0.5, 0.25])
    for module in MODULES:
        for place, (name, start) in enumerate((("parity", 0.5), ("loop", 0.25))):
            matching = [w for who, glob, w in rules if who == name and fnmatchcase(module, glob)]
            assert found[module][place] == ([start, *matching])[-1]
