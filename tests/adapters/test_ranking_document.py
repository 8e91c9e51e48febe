"""Which experts are compared, why others are not, and what of it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.adapters.ranking_document import Ranking, open_ranked, read_ranking
from pimerge.core.errors import PimergeError
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases
from pimerge.ranking.by_store import rank_by_store
from pimerge.ranking.measure import MEASURES
from pimerge.ranking.selection import SelectionRule
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas, edit_tensors
from tests.support.numerics import change_basis
from tests.support.tasks import write_json

BY_FACTORS = ["fisher-factors", "fisher-raw", "task2vec", "parameters"]
"""Measures that compare experts factor by factor."""


SIGNED_SHIFT = torch.roll(torch.eye(4), 1, 0) * torch.tensor([1.0, -1.0, 1.0, -1.0])


def add_zero_biases(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("weight", "bias")] = torch.zeros(len(tensors[key]))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | fields)


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path
) -> Path:
    """A pool with its store: x, three that fit it, and one of each sort that does not."""
    folder = tmp_path_factory.mktemp("ranking")
    pool = folder / "pool"
    for seed, name in enumerate(("x", "near", "far", "third")):
        make_expert(pool / name, vit_base, parity_task, seed=seed)
    make_expert(pool / "other-rank", vit_base, parity_task, r=2)
    make_expert(pool / "other-modules", vit_base, parity_task, target_modules=["k_proj"])
    make_expert(pool / "other-init", vit_base, parity_task, init_seed=5)
    edit_tensors(make_expert(pool / "other-bias", vit_base, parity_task, seed=4), add_zero_biases)
    edit_config(pool / "other-bias", lora_bias=True)
    edit_tensors(
        make_expert(pool / "rotated", vit_base, parity_task), lambda tensors: change_basis(tensors, SIGNED_SHIFT)
    )
    other_base = folder / "vit-other"
    shutil.copytree(vit_base, other_base)
    weights = load_file(vit_base / "model.safetensors")
    save_file({key: value + 1e-3 for key, value in weights.items()}, other_base / "model.safetensors", {"format": "pt"})
    make_expert(pool / "other-base", vit_base, parity_task)
    edit_config(pool / "other-base", base_model_name_or_path="vit-other")
    store, bases = Store(folder / "embeddings.json"), Bases(torch.device("cpu"), torch.float32)
    for path in sorted(pool.iterdir()):
        expert = open_expert(path)
        embed_expert(expert, check_expert(expert), store, EmbedSettings(max_examples=8), bases)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pool and its store, to be changed; it lies beside them, so relative paths still hold."""
    return shutil.copytree(template, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)


def rank_in(folder: Path, target: str = "x", measure: str = "fisher", k: int = 2) -> Ranking:
    return rank_by_store(
        Store(folder / "embeddings.json"), target, MEASURES.load(measure), SelectionRule(k, gate=False)
    )


def reasons_of(ranking: Ranking) -> dict[str, str]:
    return {other.name: other.reason for other in ranking.not_comparable}


@pytest.mark.parametrize("measure", BY_FACTORS)
def test_only_experts_of_one_form_and_init_are_compared_factor_by_factor(template: Path, measure: str) -> None:
    ranking = rank_in(template, measure=measure)
    assert {candidate.name for candidate in ranking.candidates} == {"near", "far", "third"}
    reasons = reasons_of(ranking)
    assert "its base is vit-other" in reasons["other-base"]
    assert reasons["other-rank"] == "its rank is 2, but the target has rank 4"
    assert reasons["other-modules"] == "it adapts other modules than the target"
    assert "its init differs" in reasons["other-init"]
    assert "its init differs" in reasons["rotated"]
    assert "--measure delta" in reasons["rotated"]
    assert "bias" in reasons["other-bias"]
    assert len(reasons) == 6


def test_the_order_and_the_scores_are_those_of_the_measure(template: Path) -> None:
    store = Store(template / "embeddings.json")
    whole = {
        name: torch.cat([value.double().flatten() for _, value in sorted(store.diagonal(name).items())])
        for name in ("x", "near", "far", "third")
    }
    scores = {
        name: float(whole["x"] @ whole[name] / (whole["x"].norm() * whole[name].norm()))
        for name in ("near", "far", "third")
    }
    expected = sorted(scores, key=lambda name: -scores[name])
    ranking = rank_in(template, measure="fisher-raw")
    assert [candidate.name for candidate in ranking.candidates] == expected
    assert {candidate.name: candidate.score for candidate in ranking.candidates} == pytest.approx(scores)
    assert ranking.selected == expected[:2]
    assert [candidate.name for candidate in ranking.chosen()] == ranking.selected
    for candidate in ranking.candidates:
        assert -1 <= candidate.low <= candidate.score <= candidate.high <= 1
        assert (candidate.scale, candidate.gain) == (1, None)
    assert (ranking.base_score, ranking.seen) == (None, None)


def test_delta_compares_all_of_one_base(template: Path) -> None:
    ranking = rank_in(template, measure="delta", k=3)
    names = ["far", "near", "other-bias", "other-init", "other-modules", "other-rank", "rotated", "third"]
    dense = {name: dense_deltas(open_expert(template / "pool" / name)) for name in ("x", *names)}
    modules = sorted({module for deltas in dense.values() for module in deltas})
    nothing = torch.zeros(16, 16, dtype=torch.float64)
    whole = {
        name: torch.cat([deltas.get(module, nothing).flatten() for module in modules]) for name, deltas in dense.items()
    }
    mean = torch.stack(list(whole.values())).mean(0)
    scores = {
        name: float(torch.cosine_similarity(whole["x"] - mean, whole[name] - mean, dim=0, eps=0)) for name in names
    }
    assert {c.name: c.score for c in ranking.candidates} == pytest.approx(scores)
    assert reasons_of(ranking).keys() == {"other-base"}
    assert ranking.selected[0] == "rotated"  # the same ΔW as x
    assert ranking.candidates[0].score == pytest.approx(1)


def test_the_default_compares_all_of_one_base(template: Path) -> None:
    assert reasons_of(rank_in(template)).keys() == {"other-base"}


def test_equal_scores_are_in_alphabetical_order(folder: Path) -> None:
    for name in ("b", "a"):
        shutil.copytree(folder / "pool" / "near", folder / "pool" / name)
        expert = open_expert(folder / "pool" / name)
        bases = Bases(torch.device("cpu"), torch.float32)
        embed_expert(
            expert, check_expert(expert), Store(folder / "embeddings.json"), EmbedSettings(max_examples=8), bases
        )
    names = [candidate.name for candidate in rank_in(folder, measure="delta").candidates]
    start = names.index("a")
    assert names[start : start + 3] == ["a", "b", "near"]


def test_fewer_experts_than_asked_for_are_all_selected(template: Path) -> None:
    assert len(rank_in(template, measure="fisher-raw", k=50).selected) == 3


def test_a_target_that_nothing_can_be_compared_with_has_an_empty_ranking(template: Path) -> None:
    ranking = rank_in(template, target="other-rank", measure="fisher-raw")
    assert ranking.candidates == []
    assert ranking.selected == []
    assert len(ranking.not_comparable) == 9


def test_other_label_modes_are_not_compared_by_fisher(folder: Path) -> None:
    expert = open_expert(folder / "pool" / "near")
    store, bases = Store(folder / "embeddings.json"), Bases(torch.device("cpu"), torch.float32)
    embed_expert(expert, check_expert(expert), store, EmbedSettings(max_examples=8, labels="sampled"), bases)
    assert reasons_of(rank_in(folder))["near"] == "its Fisher has sampled labels, the target's true"
    assert "near" not in reasons_of(rank_in(folder, measure="delta"))


def test_a_candidate_that_changed_or_went_is_left_out_with_the_reason(
    folder: Path, make_expert: MakeExpert, vit_base: Path
) -> None:
    make_expert(folder / "pool" / "near", vit_base, seed=9)
    shutil.rmtree(folder / "pool" / "far")
    ranking = rank_in(folder, measure="fisher-raw")
    assert "has changed since it was embedded" in reasons_of(ranking)["near"]
    assert "is gone" in reasons_of(ranking)["far"]
    assert [candidate.name for candidate in ranking.candidates] == ["third"]


def test_a_target_that_changed_is_an_error(folder: Path, make_expert: MakeExpert, vit_base: Path) -> None:
    make_expert(folder / "pool" / "x", vit_base, seed=9)
    with pytest.raises(PimergeError, match="has changed since it was embedded"):
        rank_in(folder)


def test_a_candidate_whose_sidecar_was_altered_says_so_where_that_is_needed(folder: Path) -> None:
    (sidecar := next((folder / "embeddings").glob("near.[0-9a-f]*.safetensors"))).write_bytes(b"")
    ranking = rank_in(folder, measure="fisher-raw")
    assert f"{sidecar.name}' has changed" in reasons_of(ranking)["near"]
    assert "near" not in {candidate.name for candidate in ranking.candidates}
    assert "near" in {candidate.name for candidate in rank_in(folder, measure="delta").candidates}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"measure": "fihser"}, "did you mean 'fisher'?"), ({"measure": "delt"}, "'delta'")],
)
def test_wrong_options_are_named(template: Path, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(PimergeError) as caught:
        rank_in(template, **arguments)
    assert expected in str(caught.value)


def test_a_ranking_reads_back_and_its_paths_are_relative_to_it(folder: Path) -> None:
    ranking = rank_by_store(Store(folder / "embeddings.json"), "x", MEASURES.load("delta"), SelectionRule(2))
    written = ranking.save(folder / "deep" / "ranking.json")
    again = read_ranking(folder / "deep" / "ranking.json")
    assert again == written
    assert again.path == folder / "deep" / "ranking.json"
    assert again.target.path == "../pool/x"
    moved = folder.with_name(folder.name + "-moved")
    folder.rename(moved)
    for candidate in again.chosen():
        assert open_ranked(candidate, moved / "deep" / "ranking.json").name == candidate.name


def test_an_expert_that_changed_since_it_was_ranked_is_not_opened(
    folder: Path, make_expert: MakeExpert, vit_base: Path
) -> None:
    chosen = rank_in(folder).chosen()[0]
    make_expert(folder / "pool" / chosen.name, vit_base, seed=9)
    with pytest.raises(PimergeError, match="has changed since"):
        open_ranked(chosen, Path("ranking.json"))


def test_the_same_ranking_may_be_written_again_and_another_needs_force(folder: Path) -> None:
    path = folder / "ranking.json"
    rank_in(folder).save(path)
    content = path.read_bytes()
    rank_in(folder).save(path)
    assert path.read_bytes() == content
    with pytest.raises(PimergeError, match="--force"):
        rank_in(folder, k=1).save(path)
    assert path.read_bytes() == content
    rank_in(folder, k=1).save(path, force=True)
    assert len(read_ranking(path).selected) == 1


@pytest.mark.parametrize("damage", [lambda d: d.pop("candidates"), lambda d: d.update(extra=1)])
def test_a_document_that_is_no_ranking_is_refused(folder: Path, damage: Callable[[Any], Any]) -> None:
    document = rank_in(folder).model_dump()
    damage(document)
    write_json(folder / "ranking.json", document)
    with pytest.raises(PimergeError, match=r"ranking.json"):
        read_ranking(folder / "ranking.json")


def test_a_ranking_that_is_not_there_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="run 'pimerge rank --target NAME' first"):
        read_ranking(tmp_path / "ranking.json")


def test_the_pools_models_are_those_of_peft(template: Path, vit_base: Path) -> None:
    """The rotated expert is indeed x: a check of this file's own fixture."""
    from peft import PeftModel

    pixels = {"pixel_values": torch.rand(2, 3, 16, 16)}
    with torch.no_grad():
        first, second = (
            PeftModel.from_pretrained(model_for(vit_base), template / "pool" / name).eval()(**pixels).logits
            for name in ("x", "rotated")
        )
    torch.testing.assert_close(first, second)
