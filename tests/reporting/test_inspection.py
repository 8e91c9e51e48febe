"""What each expert of a pool is, which go together, and what the store knows of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.core.files import sha256_file
from pimerge.embedding.store import DIAGONAL, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.reporting.inspection import Finding, fisher_statistics, inspect
from tests.support.experts import PREFIX, MakeExpert, raw_expert, set_config, set_tensors, updates_of
from tests.support.numerics import normal


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
    assert first.not_ranked["other_rank"] == "its rank is 2, but the target has rank 4"
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


def test_an_unreadable_expert_is_a_finding_not_an_error(pool: Path) -> None:
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
    assert first.merges_with == ("x/twin", "y/twin")


def embedded(expert: Expert, store: Store, diagonal: dict[str, Tensor]) -> None:
    """Put an expert into the store with a diagonal that the test knows."""
    fields = {
        "path": store.path_of(expert),
        "sha256": expert.sha256,
        "config_sha256": sha256_file(expert.path / CONFIG),
        "task_sha256": "0",
        "kind": expert.kind,
        "base": "b",
        "task": {},
        "settings": EmbedSettings(labels="sampled"),
        "examples": 7,
        "tokens": 11,
        "device": "cpu",
        "route": "rules",
        "sketches": {},
    }
    store.add(expert.name, fields, {DIAGONAL: diagonal, SECOND_MOMENTS: {}})


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Expert, Store, dict[str, Tensor]]:
    """An expert with biases in the store, and its diagonal."""
    updates = updates_of({"q": (3, 2, 4), "v": (5, 2, 4)})
    biases = {f"{PREFIX}{name}.lora_B.bias": normal(size) for name, size in (("q", 3), ("v", 5))}
    expert = open_expert(raw_expert(tmp_path / "pool" / "known", updates, biases, lora_bias=True))
    store = Store(tmp_path / "embeddings.json")
    diagonal = {
        key: normal(*entry.shape, seed=i).square() for i, (key, entry) in enumerate(expert.file.entries.items())
    }
    embedded(expert, store, diagonal)
    return expert, store, diagonal


def test_the_statistics_are_those_of_the_whole_diagonal(stored: tuple[Expert, Store, dict[str, Tensor]]) -> None:
    expert, store, diagonal = stored
    (finding,) = inspect([expert.path], store=store)
    found = finding.fisher
    assert found is not None
    F = torch.cat([value.double().flatten() for value in diagonal.values()])
    assert (found.examples, found.tokens, found.labels) == (7, 11, "sampled")
    assert found.trace == pytest.approx(float(F.sum()))
    assert found.norm == pytest.approx(float(F.norm()))
    assert found.largest_share == pytest.approx(float(F.max() / F.sum()))
    assert found.effective == pytest.approx(float(F.sum() ** 2 / F.square().sum()))
    assert found.effective_share == pytest.approx(found.effective / len(F))
    traces = {name: sum(float(v.double().sum()) for key, v in diagonal.items() if f".{name}." in key) for name in "qv"}
    assert found.modules == pytest.approx(traces)
    assert list(found.modules) == sorted(traces, key=lambda name: -traces[name])
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("value", "effective"), [(0.3, 1.0), (0.0, 0.0)])
def test_even_information_is_that_of_all_parameters_and_none_is_that_of_none(
    stored: tuple[Expert, Store, dict[str, Tensor]], value: float, effective: float
) -> None:
    expert, store, diagonal = stored
    embedded(expert, store, {key: torch.full_like(tensor, value) for key, tensor in diagonal.items()})
    count = sum(tensor.numel() for tensor in diagonal.values())
    found = fisher_statistics(store.experts["known"], store.traces("known"), count)
    assert found.effective_share == pytest.approx(effective)
    assert found.effective == pytest.approx(effective * count)
    assert found.largest_share == pytest.approx(effective / count)
    assert sum(found.shares.values()) == pytest.approx(effective)


def test_without_statistics_the_reason_is_said(stored: tuple[Expert, Store, dict[str, Tensor]], tmp_path: Path) -> None:
    expert, store, _ = stored
    other = raw_expert(tmp_path / "pool" / "other", updates_of({"q": (3, 2, 4)}))
    broken = tmp_path / "pool" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    found = inspect([expert.path, other, broken], store=store)
    assert [finding.no_fisher for finding in found] == ["", "it is not in the store", "it cannot be read"]
    assert [finding.no_fisher for finding in inspect([other])] == ["no store was given"]
    sidecar = store.path.parent / store.experts["known"].sidecars[DIAGONAL].file
    content = sidecar.read_bytes()
    sidecar.unlink()
    assert inspect([expert.path], store=store)[0].no_fisher == f"the sidecar '{sidecar}' is gone"
    sidecar.write_bytes(content)
    set_config(expert.path, revision="x")
    assert inspect([expert.path], store=store)[0].no_fisher == "changed since it was embedded"
    set_tensors(expert.path, {f"{PREFIX}q.lora_B.bias": normal(3, seed=5)})
    (finding,) = inspect([expert.path], store=store)
    assert (finding.fisher, finding.no_fisher) == (None, "changed since it was embedded")
