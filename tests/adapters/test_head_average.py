"""``--head average`` of experts whose labels are not known."""

from __future__ import annotations

from pathlib import Path

import pytest

import pimerge
from pimerge.core.errors import PimergeError
from tests.support.experts import PREFIX, raw_expert, updates_of
from tests.support.numerics import normal


def test_heads_without_labels_are_refused_with_options_that_work(tmp_path: Path) -> None:
    head = {f"{PREFIX}classifier.weight": normal(2, 5)}
    experts = [
        raw_expert(tmp_path / name, updates_of({"q": (4, 2, 5)}), head, modules_to_save=["classifier"]) for name in "ab"
    ]
    with pytest.raises(PimergeError, match=r"'a', 'b' have no task\.json") as caught:
        pimerge.merge(experts, head="average", output=None)
    assert "--head target --target EXPERT" in str(caught.value)
    pimerge.merge(experts, head="target", target=experts[0], output=tmp_path / "one")
    pimerge.merge(experts, head="none", output=tmp_path / "none")
