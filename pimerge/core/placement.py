"""Put finished outputs in place: one process at a time, and a kill at any moment loses nothing.

An output is written beside its destination, under a hidden name, and then renamed. A folder that it replaces changes
places with it where the system can do that in one step; elsewhere it is set aside before and removed after. While a
process writes, it holds a lock on the destination's name; so everything that is found under the hidden names once the
lock is held was left by a process that was stopped.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pimerge.core.progress import Note, unheard

_PARTIAL, _OLD, _LOCK, _SET = "partial", "old", "lock", "set"


def partial_of(path: Path) -> Path:
    """Where an output is written before it is complete."""
    return _beside(path, _PARTIAL)


def has_leftovers(path: Path) -> bool:
    """Whether another process is writing an output, or was stopped while it did."""
    return any(os.path.lexists(_beside(path, word)) for word in (_PARTIAL, _OLD, _LOCK, _SET))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, note: Note = unheard, *, wait: bool = True) -> Iterator[None]:
    """Hold the name of an output, and first put in order what a stopped process left there.

    Another process that holds it is waited for. The lock can be taken again within the block. It is a file lock of the
    system, so it ends with its process. Folders that are created to hold the lock are removed again if the block leaves
    them empty.

    Under ``accelerate launch``, the first process holds the name for all of them.

    Args:
        wait: whether to wait for another process; otherwise a BlockingIOError is raised.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from filelock import FileLock, Timeout

    path = Path(os.path.abspath(path))
    made = _make_folders(path.parent)
    try:
        lock = FileLock(_beside(path, _LOCK), is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise BlockingIOError(f"'{path}' is being written") from None
            note(f"another process of pimerge is writing '{path.name}': waiting until it is done")
            lock.acquire()
        try:
            if lock.lock_counter == 1:
                _put_in_order(path, note)
            yield
        finally:
            if lock.lock_counter == 1:  # a process that waits for the removed file notices, and creates a new one
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def place(partial: Path, path: Path) -> None:
    """Move a complete output to its destination; what is there stays until then, and comes back if the move fails."""
    old = None
    is_there = path.exists() or path.is_symlink()
    if is_there and (_is_folder(path) or _is_folder(partial)):  # a file replaces a file in one step
        if _exchange(partial, path):
            remove(partial)
            return
        old = path.replace(_beside(path, _OLD))
    try:
        partial.replace(path)
    except BaseException:
        if old is not None:
            old.replace(path)
        raise
    if old is not None:
        remove(old)


def place_together(paths: Sequence[Path], key: Path) -> None:
    """Move several complete files to their destinations in one folder: all of them, if need be at the next start.

    Args:
        key: the name that the process holds for all of them.
    """
    plan = _beside(key, _SET)
    write_synced(plan, json.dumps([path.name for path in paths]))
    for path in paths:
        partial_of(path).replace(path)
    plan.unlink()


def encoded(content: bytes | str) -> bytes:
    """The bytes of a text; what UTF-8 cannot express, from names of files, is escaped as JSON escapes it."""
    return content.encode(errors="backslashreplace") if isinstance(content, str) else content


def write_synced(path: Path, content: bytes | str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(encoded(content))
        file.flush()
        os.fsync(file.fileno())


def key_of(paths: Mapping[Path, object]) -> Path:
    """The name that stands for several files in one folder: that of the first without its suffix."""
    first = next(iter(paths))
    return first.with_name(first.stem)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot, so only on Linux True."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.pimerge-{word}")


def _make_folders(folder: Path) -> list[Path]:
    """Make the missing folders, and return them, the deepest first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _put_in_order(path: Path, note: Note) -> None:
    """Finish or undo what a stopped process left under the hidden names of an output."""
    plan, partial, old = _beside(path, _SET), partial_of(path), _beside(path, _OLD)
    if plan.is_file():
        for name in _names_in(plan):
            with suppress(FileNotFoundError):  # already in place
                partial_of(path.with_name(name)).replace(path.with_name(name))
        plan.unlink()
        note(f"the files of '{path.name}' were being replaced when pimerge was stopped; all of them are in place now")
    if old.exists() or old.is_symlink():
        if path.exists() or path.is_symlink():
            remove(old)
        else:
            old.replace(path)
            note(f"'{path.name}' was being replaced when pimerge was stopped; the previous one is back")
    remove(partial)


def _names_in(plan: Path) -> list[str]:
    """The plain names that a plan lists; none if it is not whole, since then no file was moved yet."""
    try:
        names = json.loads(plan.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]
