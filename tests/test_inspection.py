"""What each expert of a pool is, and which go together."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pimerge.inspection import Finding, inspect
from tests.conftest import MakeExpert
from tests.raw import PREFIX, raw_expert, set_tensors, updates_of


@pytest.fixture
def pool(tmp_path: Path, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Experts of which some go together."""
    make_expert(tmp_path / "first", vit_base, parity_task, seed=0)
    make_expert(tmp_path / "like_it", vit_base, parity_task, seed=1)
    make_expert(tmp_path / "other_init", vit_base, parity_task, init_seed=9)
    make_expert(tmp_path / "other_rank", vit_base, parity_task, r=2)
    make_expert(tmp_path / "no_task", vit_base)
    raw_expert(tmp_path / "other_base", updates_of({"q": (3, 2, 4)}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.bin").write_bytes(b"")
    return tmp_path


def findings_of(pool: Path, *names: str) -> dict[str, Finding]:
    """Name → finding."""
    return dict(zip(names, inspect([pool / name for name in names]), strict=True))


def test_pairs_are_ranked_and_merged_where_that_is_right(pool: Path) -> None:
    found = findings_of(pool, "first", "like_it", "other_init", "other_rank")
    first = found["first"]
    assert not first.problems
    assert first.task is not None
    assert first.ranks_with == ("like_it",)
    assert first.merges_with == ("like_it", "other_init", "other_rank")
    assert first.not_merged == {}
    assert first.not_ranked["other_rank"] == "its rank is 2, the target's 4"
    assert first.not_ranked["other_init"].startswith("its init differs")


def test_an_expert_without_a_task_merges_but_is_not_ranked(pool: Path) -> None:
    found = findings_of(pool, "first", "no_task")
    assert "task.json" in found["no_task"].problems[0].message
    assert (found["no_task"].ranks_with, found["no_task"].merges_with) == ((), ("first",))
    assert (found["first"].ranks_with, found["first"].merges_with) == ((), ("no_task",))


def test_another_base_does_not_merge(pool: Path) -> None:
    found = findings_of(pool, "first", "other_base")
    assert found["first"].merges_with == ()
    assert "which is another model" in found["first"].not_merged["other_base"]


def test_what_cannot_be_read_is_a_finding_and_no_error(pool: Path) -> None:
    found = findings_of(pool, "broken", "first")
    assert found["broken"].expert is None
    assert "adapter_config.json" in found["broken"].problems[0].message
    assert "pickle" in found["broken"].problems[1].message
    assert (found["first"].merges_with, found["first"].problems) == ((), ())


def test_nan_keeps_an_expert_from_both(pool: Path) -> None:
    set_tensors(pool / "like_it", {PREFIX + "classifier.bias": torch.full((2,), math.nan)})
    found = findings_of(pool, "first", "like_it", "other_rank")
    assert "classifier.bias holds 2 values" in found["like_it"].problems[0].message
    assert (found["like_it"].ranks_with, found["like_it"].merges_with) == ((), ())
    assert found["first"].merges_with == ("other_rank",)


def test_experts_of_one_name_in_two_pools_are_told_apart(
    pool: Path, tmp_path: Path, vit_base: Path, parity_task: Path, make_expert: MakeExpert
) -> None:
    twins = [str(make_expert(tmp_path / side / "twin", vit_base, parity_task)) for side in ("x", "y")]
    first, *_ = inspect([pool / "first", *twins])
    assert first.merges_with == tuple(twins)
