"""The store on disk: whole at any moment, extended by several processes, and never trusted blindly."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.embedding.store import DIAGONAL, GRAMS, SECOND_MOMENTS, Store, open_store, unknown_target
from pimerge.embedding.store_schema import SCHEMA, EmbedSettings, MeasuredGains
from tests.support.experts import MakeExpert
from tests.support.kills import killed_before
from tests.support.tasks import write_json

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KEY = "base_model.model.{}.lora_B.weight"


def diagonal_of(number: int) -> dict[str, Tensor]:
    return {KEY.format(module): torch.full((4, 2), float(number + 1)) for module in ("q", "v")}


def moments_of(number: int) -> dict[str, Tensor]:
    return {f"{part}.{module}": torch.full((4,), float(number + 3)) for module in "qv" for part in ("input", "output")}


def grams_of(number: int) -> dict[str, Tensor]:
    return {module: torch.full((3, 3), float(number + 2)) for module in ("q", "v")}


def tensors_of(number: int, *, grams: bool = False) -> dict[str, dict[str, Tensor]]:
    """What is stored of an expert."""
    without = {DIAGONAL: diagonal_of(number), SECOND_MOMENTS: moments_of(number)}
    return {**without, GRAMS: grams_of(number)} if grams else without


def fields_of(path: str, sha256: str = "0") -> dict[str, Any]:
    return {
        "path": path,
        "sha256": sha256,
        "config_sha256": "0",
        "task_sha256": "0",
        "kind": "lora",
        "base": "b",
        "task": {},
        "settings": EmbedSettings(),
        "examples": 1,
        "tokens": 1,
        "device": "cpu",
        "route": "rules",
        "sketches": {"gradients": "", "update": ""},
    }


def fill(path: Path, prefix: str, count: int) -> None:
    """Add experts one after the other, as one process of several does."""
    store = Store(path)
    for number in range(count):
        store.add(f"{prefix}{number}", fields_of(f"{prefix}{number}"), tensors_of(number))


def assert_whole(path: Path) -> int:
    """Check that every entry is there with its tensors; returns how many there are."""
    store = Store(path)
    for name in store.experts:
        torch.testing.assert_close(store.diagonal(name), diagonal_of(int(name[1:])), rtol=0, atol=0)
        file = store.second_moments_file(name)
        marginals = {key: file.read(key) for key in file.entries}
        torch.testing.assert_close(marginals, moments_of(int(name[1:])), rtol=0, atol=0)
    return len(store.experts)


@needs_fork
def test_a_kill_at_any_moment_leaves_the_store_whole(tmp_path: Path) -> None:
    found = []
    for change in count():
        path = tmp_path / str(change) / "embeddings.json"
        fill(path, "a", 1)
        killed = killed_before(change, partial(fill, path, "b", 1))
        found.append(assert_whole(path))
        fill(path, "z", 1)  # the lock of a dead process does not block others
        assert assert_whole(path) == found[-1] + 1
        assert not list(path.parent.glob(".embeddings.json.partial*"))
        if not killed:
            break
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert len(found) > 5


@needs_fork
def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.json"
    fork = multiprocessing.get_context("fork")  # no second import of torch
    processes = [fork.Process(target=fill, args=(path, prefix, 12)) for prefix in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert assert_whole(path) == 24


def test_entries_are_in_alphabetical_order_whatever_the_order_of_adding(tmp_path: Path) -> None:
    contents = []
    for order in ((1, 0, 2), (0, 2, 1)):
        store = Store(tmp_path / "embeddings.json")
        for number in order:
            store.add(f"n{number}", fields_of(f"n{number}"), tensors_of(number))
        contents.append(store.path.read_bytes())
        store.path.unlink()
    assert contents[0] == contents[1]
    assert list(json.loads(contents[0])["experts"]) == ["n0", "n1", "n2"]


def test_norm_trace_and_modules_are_those_of_the_tensors(tmp_path: Path) -> None:
    store = Store(tmp_path / "embeddings.json")
    store.add("n1", fields_of("n1"), tensors_of(1))
    entry = store.experts["n1"]
    assert entry.norm == pytest.approx((16 * 2.0**2) ** 0.5)
    assert entry.trace == pytest.approx(32)
    assert store.traces("n1") == {"q": 16, "v": 16}


@pytest.mark.parametrize("name", ["lora_A.weight", "delora_lambda", "vblora_logits_A", "waveft_spectrum", "c3a_kernel"])
def test_a_trace_is_that_of_a_module_whatever_the_kind(tmp_path: Path, name: str) -> None:
    store, tensors = Store(tmp_path / "embeddings.json"), tensors_of(1)
    tensors[DIAGONAL] = {f"base_model.model.layers.0.q_proj.{name}": torch.ones(3)}
    store.add("n1", fields_of("n1"), tensors)
    assert store.traces("n1") == {"layers.0.q_proj": 3}


def test_dropping_removes_the_entry_and_its_sidecars(tmp_path: Path) -> None:
    fill(tmp_path / "embeddings.json", "n", 2)
    store = Store(tmp_path / "embeddings.json")
    store.drop("n0")
    assert list(Store(store.path).experts) == ["n1"]
    assert sidecars(store) == ["n1.marginals.safetensors", "n1.safetensors"]
    assert_whole(store.path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "embeddings.json"),
        ("[]", "schema version None"),
        ("{}", "schema version None"),
        ('{"schema_version": 99, "experts": {}}', "schema version 99, expected 4"),
        (json.dumps({"schema_version": SCHEMA, "experts": {"a": {}}}), "experts.a.path: Field required"),
        (json.dumps({"schema_version": SCHEMA, "expert": {}}), "did you mean 'experts'?"),
    ],
)
def test_a_document_that_is_no_store_is_refused_and_kept(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "embeddings.json"
    path.write_text(content)
    with pytest.raises(PimergeError) as caught:
        Store(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == content


@pytest.mark.parametrize("part", [DIAGONAL, SECOND_MOMENTS])
def test_a_sidecar_that_is_gone_or_altered_is_not_read(tmp_path: Path, part: str) -> None:
    fill(tmp_path / "embeddings.json", "n", 1)
    store = Store(tmp_path / "embeddings.json")
    read = {DIAGONAL: store.diagonal, SECOND_MOMENTS: store.second_moments_file}[part]
    sidecar = tmp_path / store.experts["n0"].sidecars[part].file
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(PimergeError, match="has changed"):
        read("n0")
    sidecar.unlink()
    with pytest.raises(PimergeError, match="is gone"):
        read("n0")


@pytest.mark.parametrize("part", [DIAGONAL, SECOND_MOMENTS])
def test_an_entry_is_current_only_with_all_its_fields_and_its_sidecars(tmp_path: Path, part: str) -> None:
    fill(tmp_path / "embeddings.json", "n", 1)
    store = Store(tmp_path / "embeddings.json")
    assert store.is_current("n0", {"sha256": "0", "settings": EmbedSettings()})
    assert not store.is_current("n0", {"sha256": "1"})
    assert not store.is_current("n0", {"settings": EmbedSettings(seed=1)})
    assert not store.is_current("n1", {})
    (tmp_path / store.experts["n0"].sidecars[part].file).unlink()
    assert not store.is_current("n0", {})


def test_a_measure_gets_what_it_needs_and_no_more(filed: tuple[Store, Path]) -> None:
    store, _ = filed
    expert = store.open("x")
    views = [store.view("x", expert, diagonal=True), store.view("x", expert, moments=True), store.view("x", expert)]
    assert [view.expert for view in views] == [expert] * 3
    assert [view.diagonal is not None for view in views] == [True, False, False]
    assert [view.second_moments is not None for view in views] == [False, True, False]
    key = KEY.format("q")
    assert views[0].fisher([key])[key].tolist() == diagonal_of(0)[key].tolist()
    assert views[1].layers("output") == ["q", "v"]
    output = views[1].moments(["output.v"])["output.v"]
    assert output.tolist() == moments_of(0)["output.v"].tolist()
    factors = {key for key in expert.file.entries if ".lora_" in key}
    assert views[2].parameters == sorted(factors)


def test_a_store_that_is_not_there_or_empty_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="there is no store"):
        open_store(tmp_path / "embeddings.json")
    write_json(tmp_path / "embeddings.json", {"schema_version": SCHEMA, "experts": {}})
    with pytest.raises(PimergeError, match="holds no expert"):
        open_store(tmp_path / "embeddings.json")


@pytest.fixture
def filed(make_expert: MakeExpert, vit_base: Path, tmp_path: Path) -> tuple[Store, Path]:
    """A store with one real expert ``x`` in it."""
    from pimerge.core.files import sha256_file

    folder = make_expert(tmp_path / "pool" / "x", vit_base)
    store = Store(tmp_path / "embeddings.json")
    fields = fields_of("pool/x", open_expert(folder).sha256)
    store.add("x", {**fields, "config_sha256": sha256_file(folder / "adapter_config.json")}, tensors_of(0))
    return store, folder


def test_an_expert_is_found_by_name_and_by_folder(
    filed: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = filed
    monkeypatch.chdir(tmp_path / "pool")
    for target in ("x", str(folder), "./x", "../pool/x/"):
        assert store.find(target) == "x"
    assert store.find("y") is None
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert store.find(str(tmp_path / "link" / "pool" / "x")) == "x"
    assert Store(tmp_path / "link" / "embeddings.json").find(str(folder)) == "x"
    assert store.open("x").path.resolve() == folder


def test_a_changed_expert_is_not_opened(filed: tuple[Store, Path], make_expert: MakeExpert, vit_base: Path) -> None:
    store, folder = filed
    make_expert(folder, vit_base, seed=5)
    with pytest.raises(PimergeError, match="has changed since it was embedded"):
        store.open("x")


def test_an_expert_whose_config_has_changed_is_not_opened(filed: tuple[Store, Path]) -> None:
    store, folder = filed
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "lora_alpha": 3})
    with pytest.raises(PimergeError, match="has changed since it was embedded"):
        store.open("x")


def test_a_folder_that_is_gone_is_named(filed: tuple[Store, Path], tmp_path: Path) -> None:
    store, folder = filed
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(PimergeError, match="is gone"):
        store.open("x")


def test_an_unknown_target_suggests_the_nearest(tmp_path: Path) -> None:
    fill(tmp_path / "embeddings.json", "parity", 1)
    assert "did you mean 'parity0'?" in str(unknown_target("partiy0", Store(tmp_path / "embeddings.json")))


@pytest.fixture
def with_grams(tmp_path: Path) -> Store:
    """A store with Gram matrices of ``n0`` and none of ``n1``."""
    store = Store(tmp_path / "embeddings.json")
    store.add("n0", fields_of("n0"), tensors_of(0, grams=True))
    store.add("n1", fields_of("n1"), tensors_of(1))
    return Store(store.path)


def sidecars(store: Store) -> list[str]:
    """The names of the sidecars on disk, without the hashes."""
    return sorted(re.sub(r"\.[0-9a-f]{12}\.", ".", file.name) for file in store.sidecars.glob("*.safetensors"))


def sidecar_of(store: Store, name: str, part: str) -> Path:
    return store.path.parent / store.experts[name].sidecars[part].file


def test_grams_and_diagonals_are_read_one_tensor_at_a_time(with_grams: Store) -> None:
    grams, diagonal = with_grams.grams("n0"), with_grams.diagonal_file("n1")
    assert set(grams.entries) == {"q", "v"}
    assert torch.equal(grams.read("v"), grams_of(0)["v"])
    assert torch.equal(diagonal.read(KEY.format("q")), diagonal_of(1)[KEY.format("q")])
    assert [with_grams.has_grams(name) for name in ("n0", "n1", "n2")] == [True, False, False]
    assert with_grams.grams_size("n0") == sidecar_of(with_grams, "n0", GRAMS).stat().st_size
    assert with_grams.grams_size("n1") == 0


def test_two_stores_in_one_folder_keep_apart(with_grams: Store) -> None:
    other = Store(with_grams.path.with_name("sampled.json"))
    other.add("n0", fields_of("n0"), tensors_of(2))
    assert torch.equal(other.diagonal_file("n0").read(KEY.format("q")), diagonal_of(2)[KEY.format("q")])
    assert torch.equal(
        Store(with_grams.path).diagonal_file("n0").read(KEY.format("q")), diagonal_of(0)[KEY.format("q")]
    )
    other.drop("n0")
    assert "n0.safetensors" in sidecars(with_grams)


def test_missing_grams_say_what_to_run(with_grams: Store) -> None:
    with pytest.raises(PimergeError, match=r"has no Gram matrices of 'n1'\n.*run 'pimerge embed --grams .*n1'"):
        with_grams.grams("n1")


def test_grams_that_are_gone_or_altered_are_not_read(with_grams: Store) -> None:
    sidecar = sidecar_of(with_grams, "n0", GRAMS)
    assert with_grams.is_current("n0", {}, grams=True)
    assert not with_grams.is_current("n1", {}, grams=True)
    sidecar.write_bytes(sidecar.read_bytes()[:-4] + b"\0\0\0\0")
    for state in ("has changed", "is gone"):
        with pytest.raises(PimergeError, match=f"{state}\n.*embed --grams"):
            with_grams.grams("n0")
        assert not with_grams.is_current("n0", {}, grams=True)
        assert with_grams.is_current("n0", {})  # the diagonal is whole
        sidecar.unlink(missing_ok=True)


def test_no_sidecar_stays_that_the_document_does_not_name(with_grams: Store) -> None:
    n0, n1 = ([f"{name}.marginals.safetensors", f"{name}.safetensors"] for name in ("n0", "n1"))
    assert sidecars(with_grams) == ["n0.grams.safetensors", *n0, *n1]
    with_grams.add("n0", fields_of("n0"), tensors_of(0))
    assert sidecars(with_grams) == [*n0, *n1]
    with_grams.add("n1", fields_of("n1"), tensors_of(1, grams=True))
    with_grams.drop("n1")
    assert sidecars(with_grams) == n0


def test_an_expert_that_is_named_like_anothers_grams_keeps_apart(with_grams: Store) -> None:
    with_grams.add("n0.grams", fields_of("n0.grams"), tensors_of(0))
    assert torch.equal(with_grams.grams("n0").read("q"), grams_of(0)["q"])
    assert torch.equal(with_grams.diagonal_file("n0.grams").read(KEY.format("q")), diagonal_of(0)[KEY.format("q")])


def assert_sidecars_are_those_that_the_document_names(path: Path) -> None:
    store = Store(path)
    for name in store.experts:
        store.diagonal_file(name)
        store.second_moments_file(name)


@pytest.mark.parametrize("work", ["add", "drop"])
def test_a_kill_at_any_moment_leaves_a_whole_store_and_no_litter(tmp_path: Path, work: str) -> None:
    path = tmp_path / "embeddings.json"

    def change() -> None:
        store = Store(path)
        store.add("n0", fields_of("n0"), tensors_of(5)) if work == "add" else store.drop("n0")

    states = []
    for number in count():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        fill(path, "n", 2)
        old = path.read_bytes()
        killed = killed_before(number, change)
        assert_sidecars_are_those_that_the_document_names(path)
        states.append(path.read_bytes() == old)
        change()
        assert_sidecars_are_those_that_the_document_names(path)
        named = {each.file for entry in Store(path).experts.values() for each in entry.sidecars.values()}
        assert {str(file.relative_to(tmp_path)) for file in tmp_path.glob("embeddings/*")} == named
        assert {file.name for file in tmp_path.iterdir()} == {"embeddings", "embeddings.json"}
        if not killed:
            break
    assert states[0]
    assert not states[-1]
    assert len(states) > 5


def test_an_expert_is_found_by_its_tensors(tmp_path: Path) -> None:
    store = Store(tmp_path / "embeddings.json")
    for name, sha256 in (("b", "1"), ("a", "1"), ("c", "2")):
        store.add(name, fields_of(name, sha256), tensors_of(0))
    assert [store.find_sha(sha256) for sha256 in "123"] == ["a", "c", None]


def test_an_overlay_grows_and_leaves_the_store_as_it_was(filed: tuple[Store, Path], tmp_path: Path) -> None:
    store, folder = filed
    files = [store.path, *sorted((tmp_path / "embeddings").glob("*.safetensors"))]
    before = [file.read_bytes() for file in files]
    overlay = store.overlay(tmp_path / "deep" / "overlay")
    assert overlay.open("x").path.samefile(folder)
    assert overlay.find(str(folder)) == "x"
    assert torch.equal(overlay.second_moments_file("x").read("input.q"), moments_of(0)["input.q"])
    overlay.add("y", fields_of("y"), tensors_of(1))
    assert list(Store(overlay.path, is_overlay=True).experts) == ["x", "y"]
    assert list(Store(store.path).experts) == list(store.experts) == ["x"]
    assert [file.read_bytes() for file in files] == before
    assert sidecars(store) == ["x.marginals.safetensors", "x.safetensors"]


GAINS = {"0.5": 0.01, "1.0": 0.02}


@pytest.fixture
def with_gains(tmp_path: Path) -> Store:
    """Three experts, of which the others' gains for ``n0`` and ``n1`` are known."""
    store = Store(tmp_path / "embeddings.json")
    for number in range(3):
        store.add(f"n{number}", fields_of(f"n{number}", str(number)), tensors_of(number))
    for target in range(2):
        sources = {f"n{n}": (str(n), GAINS) for n in range(3) if n != target}
        store.add_gains(f"n{target}", MeasuredGains(task_sha256="0", examples=5, sources=sources))
    return Store(store.path)


def known(store: Store) -> dict[str, list[str]]:
    return {target: list(sources) for target, sources in Store(store.path).history().items()}


def test_gains_are_read_as_they_were_written(with_gains: Store) -> None:
    assert known(with_gains) == {"n0": ["n1", "n2"], "n1": ["n0", "n2"]}
    assert with_gains.history()["n0"]["n2"] == {0.5: 0.01, 1.0: 0.02}


def test_gains_of_an_expert_that_changed_do_not_count(with_gains: Store) -> None:
    with_gains.add("n2", fields_of("n2", "changed"), tensors_of(2))
    assert known(with_gains) == {"n0": ["n1"], "n1": ["n0"]}


def test_gains_for_a_task_that_changed_do_not_count(with_gains: Store) -> None:
    with_gains.add("n0", {**fields_of("n0", "0"), "task_sha256": "changed"}, tensors_of(0))
    assert known(with_gains) == {"n1": ["n0", "n2"]}


def test_dropping_an_expert_drops_its_gains(with_gains: Store) -> None:
    with_gains.drop("n0")
    assert known(with_gains) == {"n1": ["n2"]}
    assert "n0" not in json.dumps(json.loads(with_gains.path.read_text())["gains"])
    with_gains.add("n0", fields_of("n0", "0"), tensors_of(0))  # the same again: nobody measured this one
    assert known(with_gains) == {"n1": ["n2"]}


@pytest.mark.parametrize("file", ["../victim.txt", "/victim.txt", "embeddings/../../victim.txt", ".."])
def test_a_sidecar_outside_the_folder_is_refused_and_kept(tmp_path: Path, file: str) -> None:
    store, victim = Store(tmp_path / "store/embeddings.json"), tmp_path / "victim.txt"
    store.add("a", fields_of("a"), tensors_of(0))
    document = json.loads(store.path.read_text())
    document["experts"]["a"]["sidecars"]["diagonal"]["file"] = str(tmp_path) * file.startswith("/") + file
    store.path.write_text(json.dumps(document))
    victim.write_text("kept")
    with pytest.raises(PimergeError, match="outside its folder"):
        store.drop("a")
    with pytest.raises(PimergeError, match="outside its folder"):
        open_store(store.path)
    assert victim.read_text() == "kept"


def test_the_files_of_a_linked_folder_of_sidecars_are_kept(tmp_path: Path) -> None:
    other = Store(tmp_path / "other/embeddings.json")
    other.add("a", fields_of("a"), tensors_of(0))
    (tmp_path / "store").mkdir()
    (tmp_path / "store/embeddings").symlink_to(other.sidecars)
    Store(tmp_path / "store/embeddings.json").add("b", fields_of("b"), tensors_of(1))
    assert other.diagonal("a").keys() == diagonal_of(0).keys()
