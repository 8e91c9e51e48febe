"""A folder as a registry, on a family made for the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.core.errors import PimergeError
from pimerge.core.plugins import Family, Option, Strategy

SHARE = Option("share", float, "Share that is kept.", lambda x: 0 < x <= 1, "above 0 and at most 1")
TOP_K = Option("top_k", int, "Entries that are kept.", lambda x: x > 0, "a positive integer")


class Side(StrEnum):
    """Choices of an option."""

    LEFT = "left"
    RIGHT = "right"
    BOTH = "both"


SIDE = Option("side", Side, "Where to start.", lambda side: side != "both")


@dataclass(frozen=True, kw_only=True)
class Shape(Strategy):
    """A strategy with a field of its own."""

    corners: int


FILES = {
    "square": "SHAPE = Shape(name='square', summary='Four sides.', corners=4, options={SHARE: 0.5, TOP_K: 3})",
    "long_circle": "SHAPE = Shape(name='long-circle', summary='No corners.', corners=0, options={SHARE: 0.25})",
    "_shared": "raise AssertionError('a file with an underscore is not a strategy')",
    "misnamed": "SHAPE = Shape(name='other', summary='Wrong.', corners=1)",
    "untyped": "SHAPE = 'a text'",
}


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family[Shape]]:
    """The two good files of ``FILES``, and one that begins with an underscore."""
    package = ModuleType("shapes_of_a_test")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name in ("square", "long_circle", "_shared"):
        write(tmp_path, name)
    yield Family(package.__name__, "shape", "SHAPE", Shape)
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        del sys.modules[name]


def write(folder: Path, name: str, text: str = "") -> None:
    """Write one of ``FILES``, or a file with that text."""
    head = f"from {__name__} import SHARE, TOP_K, Shape\n"
    (folder / f"{name}.py").write_text(head + (text or FILES[name]))


def test_a_folder_lists_its_strategies_without_importing_them(family: Family[Shape]) -> None:
    assert family.names() == ["long-circle", "square"]
    assert not [name for name in sys.modules if name.startswith(f"{family.package}.")]


def test_adding_a_file_adds_a_strategy(family: Family[Shape], tmp_path: Path) -> None:
    (tmp_path / "line.py").write_text(
        f"from {__name__} import Shape\nSHAPE = Shape(name='line', summary='', corners=2)"
    )
    assert [(shape.name, shape.corners) for shape in family] == [("line", 2), ("long-circle", 0), ("square", 4)]


def test_a_second_folder_on_the_path_extends_a_family(
    family: Family[Shape], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("more")
    write(folder, "dot", "SHAPE = Shape(name='dot', summary='', corners=1)")
    sys.modules[family.package].__path__.append(str(folder))
    assert family.names() == ["dot", "long-circle", "square"]
    assert family.load("dot").corners == 1


@pytest.mark.parametrize("name", ["long-circle", "long_circle"])
def test_underscores_of_a_name_count_as_hyphens(family: Family[Shape], name: str) -> None:
    assert family.load(name).name == "long-circle"


@pytest.mark.parametrize(("name", "meant"), [("sqaure", "square"), ("Square", "square"), ("long-cirle", "long-circle")])
def test_an_unknown_name_suggests_the_nearest(family: Family[Shape], name: str, meant: str) -> None:
    with pytest.raises(PimergeError, match=f"there is no shape '{name}'\n.*'{meant}'"):
        family.load(name)


@pytest.mark.parametrize("name", ["", "__init__", "_shared", "../square", "os"])
def test_only_names_of_the_folder_are_imported(family: Family[Shape], name: str) -> None:
    with pytest.raises(PimergeError, match="there is no shape"):
        family.load(name)


@pytest.mark.parametrize(
    ("name", "message"), [("misnamed", "the file of 'misnamed' defines 'other'"), ("untyped", "SHAPE is a str")]
)
def test_a_file_without_the_object_of_its_name_is_a_bug(
    family: Family[Shape], tmp_path: Path, name: str, message: str
) -> None:
    write(tmp_path, name)
    with pytest.raises(AssertionError, match=message):
        family.load(name)


def test_options_know_who_has_them(family: Family[Shape]) -> None:
    assert family.options() == {SHARE: {"long-circle": 0.25, "square": 0.5}, TOP_K: {"square": 3}}
    assert family.load("square").defaults == {"share": 0.5, "top_k": 3}


def test_options_that_were_not_given_are_left_out(family: Family[Shape]) -> None:
    square = family.load("square")
    assert family.given_options(square, {"share": None, "top_k": 2, "corners": None}) == {"top_k": 2}


def test_all_problems_of_options_are_reported_at_once(family: Family[Shape]) -> None:
    circle = family.load("long-circle")
    with pytest.raises(PimergeError) as refused:
        family.given_options(circle, {"share": 2.0, "top_k": 3, "colour_map": "red"})
    text = str(refused.value)
    assert "--share must be above 0 and at most 1; got 2.0" in text
    assert "'long-circle' has no option --top-k" in text
    assert "it is for square" in text
    assert "'long-circle' has no option --colour-map" in text
    assert "leave it out" in text


@given(st.floats())
def test_a_number_is_accepted_exactly_in_its_range(value: float) -> None:
    assert (SHARE.problem(value) == "") == (0 < value <= 1)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_an_integer_is_accepted_exactly_in_its_range(value: int) -> None:
    problem = TOP_K.problem(value)
    assert problem == ("" if value > 0 else f"--top-k must be a positive integer; got {value}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_option_without_a_range_takes_finite_numbers_alone(value: float) -> None:
    anything = Option("anything", float, "Any number.")
    assert anything.problem(1e30) == ""
    assert anything.problem(1e300) == "--anything must be a number of float32; got 1e+300"
    assert anything.problem(value) == f"--anything must be a finite number; got {value}"


@pytest.mark.parametrize("value", ["2", None, True, [2], 2**63])
def test_a_value_of_another_type_is_refused_in_words(value: Any) -> None:
    assert TOP_K.problem(value).startswith("--top-k must be an integer")
    assert isinstance(value, int) or SHARE.problem(value).startswith("--share must be a number; got")


@given(st.one_of(st.sampled_from(list(Side)), st.text()))
def test_a_choice_is_one_of_the_accepted_members(value: str) -> None:
    assert SIDE.choices == ["left", "right"]
    assert (SIDE.problem(value) == "") == (value in ("left", "right"))


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        (TOP_K, "--top-k"),
        (Option("k", int, ""), "-k"),
        (Option("held_out", float, "", typed="held_out_share"), "--held-out-share"),
    ],
)
def test_the_flag_of_an_option(option: Option, flag: str) -> None:
    assert option.flag == flag
