"""Whether every expert comes back from the path of a merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import Truncation
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, open_method
from pimerge.merging.preparation import prepare
from pimerge.merging.self_check import TOLERANCE, verify
from pimerge.merging.update_merge import UpdateSettings
from tests.support.experts import PREFIX, raw_expert, set_tensors, updates_of
from tests.support.numerics import normal

NAMES = METHODS.names()
SHAPES = {"q": (7, 2, 5), "v": (6, 3, 9)}


@pytest.fixture
def experts(tmp_path: Path) -> list[Expert]:
    """Two experts from one init, the second a little further."""
    first, moved = updates_of(SHAPES), updates_of(SHAPES, seed=50)
    second = {name: (A + 0.1 * moved[name][0], moved[name][1]) for name, (A, _) in first.items()}
    return [open_expert(raw_expert(tmp_path / name, updates)) for name, updates in (("a", first), ("b", second))]


def statistics(method: str) -> dict[str, Any]:
    """A Fisher or Gram matrices, where a method needs them."""

    def fisher(expert: Expert, key: str) -> Tensor:
        return normal(*expert.file.entries[key].shape, seed=len(key)).square()

    def gram(expert: Expert, module: str) -> Tensor:
        X = normal(30, expert.modules[module].d_in, seed=len(expert.name))
        return X.T @ X

    needs = open_method(method).needs
    return ({"fisher": fisher} if "fishers" in needs else {}) | ({"gram": gram} if "grams" in needs else {})


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_gives_experts_back(name: str, rank: int | None, experts: list[Expert]) -> None:
    method = open_method(name)
    merge = prepare(experts, [0.5, 0.5], method, UpdateSettings(truncation=Truncation(rank), **statistics(name)))
    seen: list[int] = []

    def track(*_: object) -> Any:
        class Progress:
            def __enter__(self) -> Callable[[int], None]:
                return seen.append

            def __exit__(self, *_: object) -> None:
                pass

        return Progress()

    found = verify(merge, track=track)
    assert found.method == ("interpolated" if "identity" in method.strategy.breaks else name)
    assert 0 <= found.deviation <= 1e-6
    assert seen == [1, 1]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_deviation_is_that_of_one_rounding(dtype: torch.dtype, experts: list[Expert]) -> None:
    deviation = verify(prepare(experts, [1.0, 1.0], open_method("ties"), UpdateSettings(dtype=dtype))).deviation
    assert deviation <= max(2 * torch.finfo(dtype).eps, 1e-14)
    assert (deviation > torch.finfo(dtype).eps / 100) or dtype == torch.float64


def test_experts_that_lack_a_module_and_zero_updates_pass(tmp_path: Path, experts: list[Expert]) -> None:
    partial = raw_expert(tmp_path / "c", {"q": (normal(2, 5), torch.zeros(7, 2))})
    assert verify(prepare([*experts, open_expert(partial)], [1.0, 1.0, 1.0], open_method("iso-c"))).deviation < 1e-6


def drifting(factor: float) -> Callable[[Expert, str], Factors]:
    """A reader that gives something else the second time it reads module ``v``."""
    known: set[tuple[str, str]] = set()

    def read(expert: Expert, name: str) -> Factors:
        factors = expert.factors(name)
        if name == "v" and (expert.name, name) in known:
            return Factors(factors.A, factors.B * factor, factors.scaling)
        known.add((expert.name, name))
        return factors

    return read


@pytest.mark.parametrize("name", ["uniform", "ties", "knots", "iso-c"])
def test_a_broken_path_is_an_error_that_names_modules_and_experts(name: str, experts: list[Expert]) -> None:
    merge = prepare(experts, [0.5, 0.5], open_method(name), UpdateSettings(read=drifting(1.01)))
    with pytest.raises(PimergeError) as caught:
        verify(merge)
    assert str(caught.value).startswith("the merge is not written, because the self-check failed")
    said = [problem.message for problem in caught.value.problems]
    assert [message.partition(" comes")[0] for message in said] == ["module 'v' of 'a'", "module 'v' of 'b'"]
    assert all("a deviation of 1.0e-02, expected at most 1e-05" in message for message in said)


def test_a_drift_within_the_dtypes_rounding_passes(experts: list[Expert]) -> None:
    merge = prepare(
        experts, [0.5, 0.5], open_method("ties"), UpdateSettings(dtype=torch.bfloat16, read=drifting(1.001))
    )
    assert verify(merge).deviation < TOLERANCE[torch.bfloat16]


def test_nan_is_never_taken_for_a_match(tmp_path: Path, experts: list[Expert]) -> None:
    set_tensors(experts[1].path, {f"{PREFIX}q.lora_B.weight": torch.full((7, 2), float("nan"))})
    with pytest.raises(PimergeError, match="NaN or Inf"):
        verify(prepare([open_expert(expert.path) for expert in experts], [0.5, 0.5], open_method("uniform")))
