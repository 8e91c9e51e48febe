"""Which base an expert belongs to."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from pimerge.checkpoints.base import Base, find_base
from pimerge.core.errors import PimergeError
from tests.support.bases import save_base
from tests.support.numerics import normal


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_base(hub: Path, name: str, commit: str, branch: str = "main") -> Path:
    """A base in the Hub's local cache, as the Hub's client lays it out."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return save_base(repository / "snapshots" / commit, normal(2, 2))


@pytest.mark.parametrize("where", ["pool/expert/base", "pool/base", "base"])
@pytest.mark.parametrize("name", ["base", "./base"])
def test_a_relative_base_is_found_in_the_folder_or_above_it(where: str, name: str, tmp_path: Path) -> None:
    expert = tmp_path / "pool" / "expert"
    expert.mkdir(parents=True)
    folder = save_base(tmp_path / where, normal(2, 2))
    found = find_base(name, None, expert)
    assert found.folder is not None
    assert found.folder.resolve() == folder
    assert found.source == str(found.folder)


def test_the_nearest_base_goes_first_and_the_working_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert, work = tmp_path / "pool" / "expert", tmp_path / "work"
    expert.mkdir(parents=True)
    here = save_base(work / "base", normal(2, 2))
    monkeypatch.chdir(work)
    assert find_base("base", None, expert).folder == here
    above = save_base(tmp_path / "base", normal(2, 2))
    assert find_base("base", None, expert).folder == above
    near = save_base(tmp_path / "pool" / "base", normal(2, 2))
    assert find_base("base", None, expert).folder == near


def test_an_absolute_base_is_found(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", normal(2, 2))
    assert find_base(str(folder), None, tmp_path / "elsewhere").folder == folder


def test_the_same_content_is_the_same_base_wherever_it_lies(tmp_path: Path) -> None:
    first = save_base(tmp_path / "a" / "base", normal(2, 2, seed=1))
    second = shutil.copytree(first, tmp_path / "b" / "other_name")
    third = save_base(tmp_path / "c" / "base", normal(2, 2, seed=2))
    identities = [Base("any", None, folder).identity for folder in (first, second, third)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0].startswith("sha256:")


def test_every_shard_counts(tmp_path: Path) -> None:
    folders = [save_base(tmp_path / name, normal(2, 2), file="model-00001-of-00002.safetensors") for name in "ab"]
    save_base(folders[0], normal(2, 2, seed=1), file="model-00002-of-00002.safetensors")
    save_base(folders[1], normal(2, 2, seed=2), file="model-00002-of-00002.safetensors")
    assert Base("x", None, folders[0]).identity != Base("x", None, folders[1]).identity


def test_a_base_in_the_cache_is_known_by_its_commit(hub: Path, tmp_path: Path) -> None:
    snapshot = cached_base(hub, "org/base", "c" * 40)
    other = cached_base(hub, "org/base", "d" * 40, "branch")
    found = find_base("org/base", None, tmp_path)
    assert (found.folder, found.identity) == (snapshot, "org/base@" + "c" * 40)
    branch = find_base("org/base", "branch", tmp_path)
    assert (branch.folder, branch.identity) == (other, "org/base@" + "d" * 40)
    assert find_base("org/base", "c" * 40, tmp_path).identity == found.identity


def test_a_base_that_is_not_here_is_known_by_name_and_revision(hub: Path, tmp_path: Path) -> None:
    found = find_base("org/base", None, tmp_path)
    assert (found.folder, found.source, found.identity) == (None, "org/base", "org/base@main")
    assert find_base("org/base", "v1", tmp_path).identity == "org/base@v1"


@pytest.mark.parametrize("name", ["./gone", "/gone", "a/b/c", "a--b", "modèle", "gone\0", "n" * 300, "a b", ".."])
def test_what_can_be_no_base_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"neither a folder with a config\.json nor a Hub id\n.*--base"):
        find_base(name, None, tmp_path).require_reachable()


@pytest.mark.parametrize("name", [None, ""])
def test_no_base_at_all_is_said(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"names no base model\n.*--base"):
        find_base(name, None, tmp_path).require_reachable()


def test_a_base_without_weights_has_no_identity(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", torch.zeros(1))
    (folder / "model.safetensors").unlink()
    with pytest.raises(PimergeError, match="holds no weights"):
        _ = Base("base", None, folder).identity
