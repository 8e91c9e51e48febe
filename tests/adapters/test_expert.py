"""One adapter folder: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_bytes
from tests.support.bases import save_base
from tests.support.experts import (
    PREFIX,
    MakeExpert,
    dense_deltas,
    edit_tensors,
    raw_expert,
    set_config,
    set_tensors,
    updates_of,
)
from tests.support.numerics import normal, small

SHAPES = {"q": (3, 2, 4), "v": (5, 1, 4)}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small expert."""
    return raw_expert(tmp_path / "pool" / "first", updates_of(SHAPES))


def test_what_an_expert_says_of_itself(folder: Path) -> None:
    expert = open_expert(folder)
    assert (expert.name, expert.kind, expert.ranks, expert.dtypes) == ("first", "lora", (1, 2), ("F32",))
    assert expert.parameters == 2 * (3 + 4) + 1 * (5 + 4)
    assert expert.sha256 == sha256_bytes((folder / WEIGHTS).read_bytes())
    assert open_expert(f"{folder}/").name == "first"


def test_factors_are_read_when_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = open_expert(folder)
    read: list[str] = []
    original = TensorFile.read

    def watched(file: TensorFile, key: str) -> torch.Tensor:
        read.append(key)
        return original(file, key)

    monkeypatch.setattr(TensorFile, "read", watched)
    factors = expert.factors("q")
    assert read == [PREFIX + "q.lora_A.weight", PREFIX + "q.lora_B.weight"]
    A, B = updates_of(SHAPES)["q"]
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_updates_are_the_factors_in_float64_with_the_scaling(dtype: torch.dtype, tmp_path: Path) -> None:
    updates = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in updates_of(SHAPES).items()}
    updates["conv"] = (normal(2, 3, 4, 5).to(dtype), normal(6, 2, 1, 1).to(dtype))
    expert = open_expert(raw_expert(tmp_path, updates, lora_alpha=3, alpha_pattern={"q": 7})).with_strength(0.7)
    found = expert.updates(["v", "conv", "q"])
    assert list(found) == ["v", "conv", "q"]
    for name, (A, B) in found.items():
        factors = expert.factors(name)
        np.testing.assert_array_equal(A, factors.A.double().numpy(), strict=True)
        np.testing.assert_array_equal(B, (factors.scaling * factors.B.double()).numpy().T, strict=True)
    assert expert.updates([]) == {}


def test_a_scale_is_part_of_every_update_and_multiplies_over_calls(folder: Path) -> None:
    expert = open_expert(set_config(folder, lora_alpha=3, alpha_pattern={}))
    assert expert.strength == 1
    assert expert.with_strength(1) is expert
    half = expert.with_strength(0.5)
    assert (half.strength, half.with_strength(0.5).strength, half.sha256) == (0.5, 0.25, expert.sha256)
    whole, quarter = dense_deltas(expert), dense_deltas(half.with_strength(0.5))
    for name, delta in whole.items():
        torch.testing.assert_close(quarter[name], 0.25 * delta, rtol=1e-6, atol=0)


@settings(small, max_examples=60)
@given(st.data())
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = raw_expert(tmp_path / "e", updates_of(SHAPES))
    content = (folder / WEIGHTS).read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    (folder / WEIGHTS).write_bytes(content[:cut])
    with pytest.raises(PimergeError, match="is truncated or not a safetensors file"):
        open_expert(folder)


@settings(small, max_examples=60)
@given(st.binary(max_size=200))
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(b"\xff" * 8)
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = raw_expert(tmp_path / "e", updates_of(SHAPES))
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(PimergeError):
        open_expert(folder)


@settings(small, max_examples=100)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_but_never_a_crash(tmp_path: Path, at: int, value: int) -> None:
    folder = raw_expert(tmp_path / "e", updates_of(SHAPES))
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] = value
    (folder / WEIGHTS).write_bytes(content)
    try:
        expert = open_expert(folder)
        expert.require_finite()
    except PimergeError:
        return
    for name in expert.modules:
        assert expert.factors(name).A.shape[0] == expert.modules[name].rank


FIELDS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias", "peft_type"]
FIELDS += ["modules_to_save", "base_model_name_or_path", "revision", "lora_bias", "use_dora", "anything"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(small, max_examples=150)
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3))
def test_any_config_is_read_or_refused_but_never_a_crash(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = set_config(raw_expert(tmp_path / "e", updates_of(SHAPES)), **fields)
    try:
        expert = open_expert(folder)
        _ = expert.base
    except PimergeError:
        return
    assert all(isinstance(module.scaling, float) for module in expert.modules.values())


@pytest.mark.parametrize("content", ["[]", "3", "null", '"lora"', "{", ""])
def test_a_config_that_is_no_object_is_refused_by_name(content: str, folder: Path) -> None:
    (folder / CONFIG).write_text(content)
    with pytest.raises(PimergeError, match=r"adapter_config\.json'(: not valid JSON| is not a? ?JSON| is no JSON)"):
        open_expert(folder)


def test_missing_files_are_all_named_at_once(folder: Path) -> None:
    (folder / CONFIG).write_text("{")
    (folder / WEIGHTS).unlink()
    with pytest.raises(PimergeError) as caught:
        open_expert(folder)
    assert [CONFIG in problem.message or WEIGHTS in problem.message for problem in caught.value.problems] == [True] * 2


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_a_pickle_is_refused_by_name_and_never_opened(name: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    with pytest.raises(PimergeError, match=f"{name}' is a pickle"):
        open_expert(folder)
    assert find_experts(folder.parent) == [folder]  # it is not overlooked


def test_a_pickle_beside_the_safetensors_does_no_harm(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"junk")
    assert open_expert(folder).ranks == (1, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_named_with_their_tensors(value: float, folder: Path) -> None:
    bad = torch.ones(3, 2)
    bad[1, 0] = bad[2, 1] = value
    set_tensors(folder, {PREFIX + "q.lora_B.weight": bad, PREFIX + "v.lora_A.weight": torch.full((1, 4), value)})
    with pytest.raises(PimergeError) as caught:
        open_expert(folder).require_finite()
    assert [problem.message for problem in caught.value.problems] == [
        f"{PREFIX}q.lora_B.weight holds 2 values that are NaN or Inf",
        f"{PREFIX}v.lora_A.weight holds 4 values that are NaN or Inf",
    ]


@pytest.mark.parametrize(("dtype", "shown"), [(torch.int8, "I8"), (torch.uint8, "U8")])
@pytest.mark.parametrize("key", ["q.lora_A.weight", "q.lora_B.weight", "q.lora_B.bias"])
def test_quantised_factors_are_refused(dtype: torch.dtype, shown: str, key: str, folder: Path) -> None:
    shape = {"A.weight": (2, 4), "B.weight": (3, 2), "B.bias": (3,)}[key.removeprefix("q.lora_")]
    set_tensors(folder, {PREFIX + key: torch.ones(shape).to(dtype)})
    with pytest.raises(PimergeError, match=f"stored as {shown}\n.*save the adapter as F16, BF16, F32 or F64"):
        open_expert(folder)


def test_a_head_may_hold_integers_and_numbers_of_8_bits(folder: Path) -> None:
    set_config(folder, modules_to_save=["head"])
    set_tensors(folder, {PREFIX + "head.norm.num_batches_tracked": torch.tensor(3)})
    expert = open_expert(folder)
    expert.require_finite()
    assert expert.head_tensors() == {"head.norm.num_batches_tracked": torch.tensor(3)}
    set_tensors(folder, {PREFIX + "head.weight": torch.ones(2).to(torch.float8_e5m2)})
    assert open_expert(folder).head_tensors()["head.weight"].tolist() == [1, 1]


@pytest.mark.parametrize("reference", ["gone", "./gone", "a b", "a/b/c", "n" * 300, "nul\0", "org/na--me"])
def test_what_is_no_expert_is_refused_by_name(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PimergeError, match="there is no expert"):
        open_expert(reference)


def test_another_file_and_an_empty_folder_are_no_experts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"is a file, expected the folder of an expert or a \.safetensors file"):
        open_expert(folder / CONFIG)
    with pytest.raises(PimergeError, match="is not an expert: it has neither adapter_config"):
        open_expert(tmp_path)


def test_the_weights_of_a_folder_stand_for_the_folder(folder: Path) -> None:
    assert open_expert(folder / WEIGHTS) == open_expert(folder)


def test_a_single_file_is_read_with_the_config_beside_it_and_refused_without(folder: Path) -> None:
    whole = open_expert(folder)
    assert whole.sha256  # hashed before the file moves
    renamed = (folder / WEIGHTS).rename(folder / "renamed.safetensors")
    single = open_expert(renamed)
    assert (single.name, single.folder, single.sha256) == ("renamed", folder, whole.sha256)
    assert single.modules == whole.modules
    (folder / CONFIG).unlink()
    with pytest.raises(PimergeError, match=r"whose scaling alpha is in an adapter_config.json, and none is beside it"):
        open_expert(renamed)


def test_shards_with_an_index_are_one_expert(folder: Path) -> None:
    whole, tensors = open_expert(folder), load_file(folder / WEIGHTS)
    expected = {name: (factors.B @ factors.A) for name in whole.parts for factors in [whole.factors(name)]}
    (folder / WEIGHTS).unlink()
    places = {key: f"adapter_model-0000{1 + place % 2}-of-00002.safetensors" for place, key in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({key: tensors[key] for key, place in places.items() if place == shard}, folder / shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    sharded = open_expert(folder)
    assert sharded.sha256 == sha256_bytes(
        "".join(sha256_bytes((folder / shard).read_bytes()) for shard in sorted(set(places.values()))).encode()
    )
    assert {name: B.T @ A for name, (A, B) in sharded.updates(sharded.parts).items()}.keys() == expected.keys()
    for name, (A, B) in sharded.updates(sharded.parts).items():
        np.testing.assert_allclose(B.T @ A, expected[name], rtol=1e-4, atol=1e-6)
    (folder / places[next(iter(places))]).unlink()
    with pytest.raises(PimergeError, match="which does not exist"):
        open_expert(folder)


def test_a_folder_of_experts_names_those_in_it(folder: Path) -> None:
    with pytest.raises(PimergeError) as caught:
        open_expert(folder.parent)
    assert f"name the experts in it: {folder}" in str(caught.value)


def test_a_pool_is_read_in_order_and_one_expert_is_a_pool_of_one(folder: Path) -> None:
    second = raw_expert(folder.parent / "a second", updates_of(SHAPES))
    raw_expert(folder.parent / ".merged.partial-1", updates_of(SHAPES))
    (folder.parent / "base").mkdir()
    (folder.parent / "notes.txt").write_text("")
    assert find_experts(folder.parent) == [second, folder]
    assert find_experts(folder) == [folder]


def test_a_pool_without_experts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="holds no expert"):
        find_experts(tmp_path)
    with pytest.raises(PimergeError, match="there is no folder"):
        find_experts(tmp_path / "gone")


def test_the_base_is_found_beside_the_expert_and_moves_with_it(folder: Path, tmp_path: Path) -> None:
    save_base(folder.parent / "base", normal(2, 2))
    set_config(folder, base_model_name_or_path="base")
    before = open_expert(folder).base
    moved = shutil.move(folder.parent, tmp_path / "moved") / "first"
    after = open_expert(moved).base
    assert before.folder == tmp_path / "pool" / "base"
    assert after.folder == tmp_path / "moved" / "base"
    assert before.name == after.name == "base"


def test_a_base_given_by_option_goes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(folder.parent / "base", normal(2, 2))
    other = save_base(tmp_path / "other", normal(2, 2, seed=1))
    set_config(folder, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert open_expert(folder, "other").base.folder == other
    hub = open_expert(folder, "org/base@v2").base
    assert (hub.name, hub.revision) == ("org/base", "v2")


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The expert as ``org/adapter`` in the Hub's local cache, at two commits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--adapter"
    (repository / "refs").mkdir(parents=True)
    for branch, letter in (("main", "c"), ("v2", "d")):
        (repository / "refs" / branch).write_text(letter * 40)
        shutil.copytree(folder, repository / "snapshots" / (letter * 40))
    set_config(repository / "snapshots" / ("d" * 40), lora_alpha=8, alpha_pattern={})
    return repository


def test_a_hub_id_opens_from_the_local_cache_by_name_and_revision(cached: Path) -> None:
    expert = open_expert("org/adapter")
    assert expert.path == cached / "snapshots" / ("c" * 40)
    assert expert.name == "adapter"  # not the commit, which says nothing
    assert expert.modules["q"].scaling == 1.0
    for revision in ("v2", "d" * 40):
        assert open_expert(f"org/adapter@{revision}").modules["q"].scaling == 8 / 2


def test_a_folder_of_a_hub_ids_name_goes_first(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = raw_expert(Path("org/adapter"), updates_of({"only": (2, 1, 2)}))
    assert open_expert("org/adapter").path == here
    assert list(load_file(here / WEIGHTS)) == [PREFIX + "only.lora_A.weight", PREFIX + "only.lora_B.weight"]


@pytest.mark.parametrize("reference", ["org/gone", "org/adapter@gone"])
def test_a_hub_id_that_cannot_be_had_is_named(reference: str, cached: Path) -> None:
    with pytest.raises(PimergeError, match=f"'{reference}' is not a folder, and it cannot be downloaded from the Hub"):
        open_expert(reference)


def test_an_embedding_in_the_file_is_a_copy_of_the_bases_or_part_of_the_head(
    make_expert: MakeExpert, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT saves one beside the factors, unless it is told not to."""
    folder = make_expert(
        tmp_path / "x", language_base("qwen2-lm"), target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    stored = [key for key in load_file(folder / "adapter_model.safetensors") if ".base_layer." in key]
    assert len(stored) == 2
    expert = open_expert(folder)
    assert not set(stored) & {*expert.keys, *expert.head.values()}
    assert set(open_expert(folder, base="nobody/nothing").head.values()) == set(stored)
    edit_tensors(folder, lambda tensors: tensors[stored[0]].mul_(1.01))
    assert list(open_expert(folder).head.values()) == [stored[0]]
