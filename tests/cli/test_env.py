"""The command ``pimerge env``."""

from __future__ import annotations

from pathlib import Path

import pytest

from pimerge.core.files import output_lock, write_folder
from pimerge.core.hash_cache import cache_path
from tests.support.cli import Shell


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an output, and with what pimerge keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(b"12345")
    write_folder(tmp_path / "work" / "merged", {"a": "kept"}, force=False)
    for name in (".tuned.training-0123456789ab/checkpoint-2", ".merged.pimerge-partial", "comparison.runs"):
        folder = tmp_path / "work" / name
        folder.mkdir(parents=True)
        (folder / "x.json").write_text("123")
    old = tmp_path / "work" / ".lost.pimerge-old"
    old.mkdir()
    (old / "a").write_text("only copy")
    (tmp_path / "work" / "mine.runs").mkdir()  # of somebody else
    return tmp_path / "work"


def test_what_is_kept_is_listed_with_its_size(left: Path, shell: Shell) -> None:
    result = shell("env", "work", "--json")
    assert result.code == 0
    assert {"pimerge", "python", "torch"} <= result.document["versions"].keys()
    assert {(Path(each["path"]).name, each["size"]) for each in result.document["kept"]} == {
        ("pimerge", 5),
        (".tuned.training-0123456789ab", 3),
        (".merged.pimerge-partial", 3),
        ("comparison.runs", 3),
        (".lost.pimerge-old", 9),
    }
    shown = shell("env", "work")
    assert "checkpoints of a training" in shown.out
    assert "'pimerge env --clean' removes them" in shown.err


def test_clean_removes_what_is_kept_and_nothing_else(left: Path, shell: Shell) -> None:
    result = shell("env", "work", "--clean", "--json")
    assert (result.code, len(result.document["removed"])) == (0, 5)
    assert {child.name for child in left.iterdir()} == {"merged", "mine.runs", "lost"}
    assert (left / "lost" / "a").read_text() == "only copy"
    assert not cache_path().exists()
    assert shell("env", "work", "--json").document["kept"] == []


def test_what_a_process_is_writing_stays(left: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    reader, writer = os.pipe()
    go, stop = os.pipe()
    pid = os.fork()
    if pid == 0:
        with output_lock(left / "tuned"):
            os.write(writer, b"held")
            os.read(go, 1)
        os._exit(0)
    os.read(reader, 4)
    result = shell("env", "work", "--clean")
    assert "a process is writing 'work/tuned'" in result.err
    assert (left / ".tuned.training-0123456789ab").is_dir()
    os.write(stop, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_folder_that_is_not_there_is_named(shell: Shell) -> None:
    result = shell("env", "nowhere")
    assert (result.code, result.out) == (3, "")
    assert "'nowhere' is not a folder" in result.err
