"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pimerge.core import files, placement
from pimerge.core.errors import PimergeError
from tests.support.kills import killed_before
from tests.support.numerics import small


def contents_of(folder: Path) -> dict[str, bytes]:
    """File name → content, hidden ones too."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def emptied(folder: Path) -> None:
    """Remove all that is in a folder."""
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An existing folder."""
    files.write_folder(tmp_path / "out", {"a": "old", "b": b"\x00old"}, force=False)
    return tmp_path / "out"


def test_a_folder_is_written_with_all_its_files(old: Path) -> None:
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "x" / "y", {"a": "é"}, force=False)
    files.write_file(tmp_path / "z" / "f", "é")
    assert (tmp_path / "x" / "y" / "a").read_text(encoding="utf-8") == "é" == (tmp_path / "z" / "f").read_text("utf-8")


def test_what_is_there_is_replaced_only_by_force(old: Path) -> None:
    with pytest.raises(PimergeError, match=r"already exists\n.*--force"):
        files.write_folder(old, {"c": "new"}, force=False)
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}
    files.write_folder(old, {"c": "new"}, force=True)
    assert contents_of(old) == {"c": b"new"}
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_a_file_and_a_broken_link_count_as_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(PimergeError, match="already exists"):
            files.write_folder(tmp_path / name, {"a": "new"}, force=False)
        files.write_folder(tmp_path / name, {"a": "new"}, force=True)
        assert contents_of(tmp_path / name) == {"a": b"new"}


def test_force_through_a_link_replaces_the_link_and_keeps_its_target(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to(old)
    files.write_folder(link, {"c": "new"}, force=True)
    assert not link.is_symlink()
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_disk_that_refuses_leaves_everything_as_it_was(
    code: int, failing: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(PimergeError, match=f"cannot write .*{os.strerror(code)}"):
        files.write_folder(old, {"a": "new", "b": "new", "c": "new"}, force=True)
    calls = failing - 1
    with pytest.raises(PimergeError, match="cannot write"):
        files.write_file(old / "a", "new")
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_a_failing_last_rename_brings_the_old_folder_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_exchange", lambda one, other: False)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if ".pimerge-partial" in self.name:
            raise OSError(errno.ENOSPC, "full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(PimergeError, match="cannot write"):
        files.write_folder(old, {"a": "new"}, force=True)
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_an_interrupt_leaves_everything_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(old, {"a": "new"}, force=True)
    assert contents_of(old) == {"a": b"old", "b": b"\x00old"}
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_leftovers_of_a_stopped_process_are_cleared_up(tmp_path: Path) -> None:
    out, notes = tmp_path / "out[1]", []
    old, partial = (tmp_path / f".out[1].pimerge-{word}" for word in ("old", "partial"))
    other = tmp_path / ".out[1].x.pimerge-partial"  # of another output
    for leftover in (old, partial, other):
        leftover.mkdir()
        (leftover / "a").write_text("left")
    with files.output_lock(out, notes.append):
        assert contents_of(out) == {"a": b"left"}  # the folder that was set aside is back
    assert len(notes) == 1
    assert "the previous one is back" in notes[0]
    shutil.copytree(out, old)
    files.write_folder(out, {"a": "newer"}, force=True)
    assert {child.name for child in tmp_path.iterdir()} == {"out[1]", other.name}
    assert contents_of(out) == {"a": b"newer"}


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    out, notes = tmp_path / "new" / "out", []
    reader, writer = os.pipe()
    with files.output_lock(out), files.output_lock(out):  # the same process can hold it twice
        pid = os.fork()
        if pid == 0:
            with files.output_lock(out, lambda text: notes.append(text) or os.write(writer, b"waiting")):
                code = 0 if len(notes) == 1 and contents_of(out) == {"a": b"first"} else 1
            os._exit(code)
        assert os.read(reader, 10) == b"waiting"
        files.write_folder(out, {"a": "first"}, force=False)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [child.name for child in out.parent.iterdir()] == ["out"]


def test_a_lock_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="wrong"), files.output_lock(tmp_path / "a" / "b" / "out"):
        raise PimergeError("wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a**b", "[x", "q?", ".hidden", "a b", "ü"])
def test_any_name_can_be_written_twice(name: str, tmp_path: Path) -> None:
    for text in ("1", "2"):
        files.write_folder(tmp_path / name, {"a": text}, force=True)
        files.write_file(tmp_path / (name + ".json"), text)
    assert contents_of(tmp_path / name) == {"a": b"2"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("force", [False, True])
def test_paths_that_cannot_be_written_are_named(
    force: bool, old: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(old)
    before = contents_of(old)
    for path in (Path("."), Path(".."), old, old.parent, old / "a" / "out", old / "a" / "x" / "out", Path("n" * 300)):
        with pytest.raises(PimergeError):
            files.write_folder(path, {"a": "new"}, force=force)
    for path in (old, old / "a" / "f", old / "a" / "x" / "f", old / ("n" * 300)):
        with pytest.raises(PimergeError, match="cannot write"):
            files.write_file(path, "new")
    assert contents_of(old) == before
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_an_error_that_is_no_disk_error_is_a_bug(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EBADF, "bad descriptor")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="bad descriptor"):
        files.write_folder(old, {"a": "new"}, force=True)


@pytest.mark.parametrize("exchanges", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_folder_or_none(
    force: bool, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:  # as on systems other than Linux
        monkeypatch.setattr(placement, "_exchange", lambda one, other: False)
    old, new = dict.fromkeys("ab", b"old"), dict.fromkeys("abc", b"new")
    out = tmp_path / "out"
    states = []
    before = old if force else None
    for change in count():
        emptied(tmp_path)
        if force:
            files.write_folder(out, old, force=False)
        killed = killed_before(change, lambda: files.write_folder(out, new, force=force))
        assert out.exists() or not (force and exchanges)
        with files.output_lock(out):  # the next start
            found = contents_of(out) if out.exists() else None
        assert [child.name for child in tmp_path.iterdir()] == (["out"] if found else [])
        states.append(found)
        if not killed:
            break
        files.write_folder(out, {"a": "newer"}, force=out.exists())
        assert contents_of(out) == {"a": b"newer"}
    assert states[0] == before
    assert states[-1] == new
    assert all(state in (before, new) for state in states)
    assert len(states) > 5


@pytest.mark.parametrize("has_old", [False, True])
def test_a_kill_at_any_moment_leaves_a_set_of_files_whole_at_the_next_start(has_old: bool, tmp_path: Path) -> None:
    names = [tmp_path / f"plot{suffix}" for suffix in (".png", ".svg", ".json")]
    old, new = (dict.fromkeys(names, word) for word in ("old", "new"))
    before = {path.name: b"old" for path in names} if has_old else {}
    states = []
    for change in count():
        emptied(tmp_path)
        if has_old:
            files.write_files(old)
        killed = killed_before(change, lambda: files.write_files(new))
        with files.output_lock(tmp_path / "plot"):
            states.append({path.name: path.read_bytes() for path in names if path.exists()})
        files.write_files(new)
        assert sorted(tmp_path.iterdir()) == sorted(names)
        if not killed:
            break
    after = {path.name: b"new" for path in names}
    assert states[0] == before
    assert states[-1] == after
    assert all(state in (before, after) for state in states)
    assert len(states) > 8


@small
@given(st.binary(max_size=100))
def test_hashes_are_those_of_hashlib(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    assert files.sha256_file(tmp_path / "f") == files.sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_a_hash_of_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PimergeError, match="cannot read"):
            files.sha256_file(path)


TEXTS = st.text(st.characters(codec="utf-8"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)


@settings(small, max_examples=40)
@given(JSON_VALUES)
def test_json_comes_back_as_it_was(tmp_path: Path, document: object) -> None:
    text = files.json_text(document)
    files.write_file(tmp_path / "f.json", text)
    assert files.read_json(tmp_path / "f.json") == document
    assert files.json_text(files.read_json(tmp_path / "f.json")) == text


def test_nan_is_never_written_as_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.json_text({"a": math.nan})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', r"cannot read .*not valid JSON \(.*, line 1, column"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "cannot read"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"1" * 5000, "cannot read"),
        (b"[" * 200_000, "cannot read"),
    ],
)
def test_what_is_no_json_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(PimergeError, match=message):
        files.read_json(tmp_path / "f.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"f\.json' does not exist"):
        files.read_json(tmp_path / "f.json")


def test_relative_paths_lead_back(tmp_path: Path) -> None:
    assert files.relative_to(tmp_path / "a" / "b", tmp_path / "c") == "../a/b"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    relative = files.relative_to(tmp_path / "a", tmp_path / "link" / "deep")
    assert (tmp_path / "real" / "deep" / relative).resolve() == tmp_path / "a"


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "new"
    for path in (source, output):
        path.write_text("")
    for name, found in ((source, f"cannot read '{source}'"), (output, f"cannot write '{output}'")):
        with pytest.raises(PimergeError, match=found), files.disk_errors(output):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(name))
