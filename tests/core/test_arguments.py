"""Arguments of public functions are checked against their annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pimerge
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError


@checked_arguments(shots=1)
def sample(
    folder: str | Path = "a",
    *,
    shots: int | None = None,
    weights: Sequence[float] | None = None,
    rates: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
    scale: float = 1.0,
    force: bool = False,
    seed: int = 0,
    unknown: Unknown | None = None,  # type: ignore[name-defined] # noqa: F821
    **options: Any,
) -> str:
    """Return a word."""
    return "done"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"folder": Path("b"), "shots": 3, "weights": [1, 0.5], "rates": {"a": 1}, "names": ("a",)},
        {"shots": np.int64(3), "weights": np.ones(2), "scale": np.float32(2), "force": np.bool_(True)},
        {"unknown": object(), "anything": object(), "seed": 2**32 - 1, "scale": 3},
    ],
)
def test_what_fits_is_passed_on(given: dict[str, Any]) -> None:
    assert sample(**given) == "done"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("folder", 5, "str | Path"),
        ("shots", "all", "int | None"),
        ("shots", True, "int | None"),
        ("shots", 2.5, "int | None"),
        ("shots", 0, "at least 1"),
        ("shots", 2**64, "int | None"),
        ("weights", [float("nan"), 1], "Sequence[float] | None"),
        ("weights", "0.5", "Sequence[float] | None"),
        ("rates", {"a": "b"}, "Mapping[str, float] | None"),
        ("names", "abc", "Sequence[str]"),
        ("scale", 1e308, "a number of float32"),
        ("scale", float("inf"), "a finite number"),
        ("force", "no", "bool"),
        ("seed", -1, "an integer from 0 to 4294967295"),
        ("seed", 2**40, "an integer from 0 to 4294967295"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(PimergeError) as refused:
        sample(**{name: value})
    flag = name if name == "folder" else f"--{name}"
    assert str(refused.value) == f"{flag} must be {expected}; got {value!r}"


def test_all_problems_come_at_once() -> None:
    with pytest.raises(PimergeError) as refused:
        sample("a", shots=-1, force=3)  # type: ignore[arg-type]
    assert [problem.message for problem in refused.value.problems] == [
        "--shots must be at least 1; got -1",
        "--force must be bool; got 3",
    ]


@pytest.mark.parametrize(
    ("function", "given"),
    [
        ("merge", {"experts": 5}),
        ("merge", {"experts": [5]}),
        ("merge", {"experts": ["a", "b"], "weights": [float("nan"), 1]}),
        ("embed", {"experts": "a", "examples": 0}),
        ("rank", {"target": "a", "k": "x"}),
        ("tune", {"experts": ["a"], "epochs": "x"}),
        ("tune", {"experts": ["a"], "shots": "all"}),
        ("evaluate", {"experts": [3]}),
        ("compare", {"target": "a", "shots": "all"}),
        ("verify", {"merged": "a", "experts": 3}),
        ("extract", {"finetuned": "a", "base": 3}),
        ("convert", {"source": 3}),
        ("open_expert", {"reference": 3}),
    ],
)
def test_the_public_functions_refuse_other_types_in_words(
    function: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PimergeError):
        getattr(pimerge, function)(**given)
    assert list(tmp_path.iterdir()) == []
