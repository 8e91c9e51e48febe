"""A stage opens its method and its experts once, and checks once whether they are alike."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import pimerge
from pimerge.adapters.compatibility import require_alike
from pimerge.adapters.expert import open_expert
from pimerge.adapters.selected import select
from pimerge.merging.method import open_method
from pimerge.tuning.method import open_tune_method
from tests.support.experts import MakeExpert

CHECKS = 2
"""The checks that open an output before it is put in place: pimerge's own, and PEFT's where PEFT is loaded."""
COUNTED = (open_expert, open_method, open_tune_method, require_alike, select)


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the calls of some functions, whatever name a module has imported them by."""
    names: dict[CodeType, str] = {unwrap(function).__code__: function.__name__ for function in COUNTED}
    found: Counter[str] = Counter()

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in names:
            found[names[frame.f_code]] += 1

    sys.setprofile(seen)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.fixture
def experts(tmp_path: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path) -> list[Path]:
    """Three experts of one task."""
    return [
        make_expert(tmp_path / "experts" / name, bert_base, text_task, seed=seed)
        for seed, name in enumerate(("a", "b", "c"))
    ]


def test_a_merge_opens_method_and_experts_once_and_checks_likeness_once(tmp_path: Path, experts: list[Path]) -> None:
    with counting() as calls:
        pimerge.merge(experts, method="ties", density=0.5, head="none", output=tmp_path / "merged")
    assert calls == {"open_method": 1, "open_expert": len(experts) + CHECKS, "select": 1, "require_alike": 1}


def test_a_tuning_resolves_its_experts_once(tmp_path: Path, experts: list[Path], text_task: Path) -> None:
    with counting() as calls:
        pimerge.tune(experts, method="learned", target=text_task, epochs=1, output=tmp_path / "tuned")
    assert (calls["select"], calls["open_expert"], calls["open_tune_method"]) == (1, len(experts) + CHECKS, 1)
