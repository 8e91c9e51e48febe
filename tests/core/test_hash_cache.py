"""Hashes that are remembered: never another than the content's."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path

import pytest

from pimerge.core import hash_cache
from pimerge.core.files import sha256_file
from pimerge.core.hash_cache import LEAST_BYTES, cache_path


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file large enough, with a cache of its own; it counts as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "UNSETTLED_SECONDS", -1.0)
    path = tmp_path / "big"
    path.write_bytes(os.urandom(LEAST_BYTES))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept() -> list[str]:
    """What the cache holds."""
    if not cache_path().is_file():
        return []
    with sqlite3.connect(cache_path()) as connection:
        return [row[0] for row in connection.execute("SELECT sha256 FROM hashes")]


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *values: calls.append(values) or real(*values))
    return calls


def test_a_file_is_hashed_once(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_hashing(monkeypatch)
    assert sha256_file(big) == sha256_file(big) == digest(big)
    assert len(calls) == 1
    assert kept() == [digest(big)]


def test_another_content_of_the_same_size_and_time_is_seen(big: Path) -> None:
    before, times = sha256_file(big), big.stat()
    with big.open("r+b") as file:
        file.write(b"other")
    os.utime(big, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_file(big) == digest(big) != before
    assert kept() == [digest(big)]


def test_a_file_that_takes_anothers_place_is_seen(big: Path, tmp_path: Path) -> None:
    before = sha256_file(big)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(LEAST_BYTES))
    other.replace(big)
    assert sha256_file(big) == digest(big) != before


def test_a_file_that_has_just_changed_is_not_remembered(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_cache, "UNSETTLED_SECONDS", 60.0)
    assert sha256_file(big) == digest(big)
    assert kept() == []


def test_small_files_are_not_kept(big: Path) -> None:
    big.write_bytes(b"x" * (LEAST_BYTES - 1))
    assert sha256_file(big) == digest(big)
    assert kept() == []


@pytest.mark.parametrize("kind", ["a file is in the way", "no database"])
def test_without_a_cache_files_are_hashed_all_the_same(big: Path, tmp_path: Path, kind: str) -> None:
    if kind == "no database":
        cache_path().parent.mkdir(parents=True)
        cache_path().write_bytes(b"not a database" * 100)
    else:
        (tmp_path / "cache").write_text("in the way")
    assert sha256_file(big) == sha256_file(big) == digest(big)
