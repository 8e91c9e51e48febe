"""Read, hash and write files; files and folders appear complete or not at all.

Everything is written beside its destination and then renamed, so a killed process or a full disk leaves the destination
unchanged. The next write to the same destination removes the leftovers of a killed process.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pimerge.core.errors import PimergeError
from pimerge.core.hash_cache import sha256_of

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space or choose another --output",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --output",
    errno.EACCES: "writing is not permitted there: choose another --output",
    errno.EPERM: "writing is not permitted there: choose another --output",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another --output",
    errno.EISDIR: "a folder is there: remove it or choose another --output",
    errno.ENAMETOOLONG: "the name is too long: choose another --output",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another --output",
    errno.EFBIG: "the file is larger than is allowed there: choose another --output",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk error while writing ``path`` into a PimergeError; other errors are bugs."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise PimergeError(
            f"cannot write '{path}': {os.strerror(error.errno or 0)}", _DISK_ERRORS[error.errno]
        ) from error


def require_absent(path: Path, force: bool) -> None:
    """Refuse to overwrite ``path`` without ``force``, and always if it is or contains the working folder."""
    with disk_errors(path):
        exists = path.exists() or path.is_symlink()
    if exists and Path.cwd().is_relative_to(path.resolve()):
        raise PimergeError(f"'{path}' is or contains the working folder", "choose another --output")
    if exists and not force:
        raise PimergeError(f"'{path}' already exists", "pass --force to replace it, or choose another --output")


def require_same_or_absent(path: Path, text: str, force: bool) -> None:
    """Refuse to overwrite ``path`` without ``force``, unless it already holds exactly this text."""
    if not (path.is_file() and path.read_bytes() == text.encode()):
        require_absent(path, force)


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; :mod:`pimerge.core.hash_cache` caches it for large files."""
    try:
        with path.open("rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise PimergeError(f"cannot read '{path}': {error.strerror}") from error


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of several files, hashed in parallel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        return list(pool.map(sha256_file, paths))


def hashes_of(folder: Path) -> dict[str, str]:
    """File name → SHA-256, for the files in a folder, in alphabetical order."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return dict(zip((file.name for file in files), sha256_files(files), strict=True))


def json_text(document: Any) -> str:
    """Format a JSON document; the same content gives the same text.

    >>> print(json_text({"a": [1, 2]}), end="")
    {
      "a": [
        1,
        2
      ]
    }
    """
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, hint: str = "") -> Any:
    """Read a JSON document.

    Args:
        hint: what the user can do if the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PimergeError(f"'{path}' does not exist") from None
    except json.JSONDecodeError as error:
        found = f"cannot read '{path}': not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        raise PimergeError(found, hint) from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, too many digits, too deep
        raise PimergeError(f"cannot read '{path}': {error}") from error


def relative_to(path: Path, folder: Path) -> str:
    """The path from ``folder`` to ``path``, with forward slashes; it stays valid when both move together."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file completely or not at all."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write several files: all of them or none."""
    partials: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _sweep(path)
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                partials[path] = _beside(path, "partial")
                _write_synced(partials[path], data)
        for path, partial in partials.items():
            with disk_errors(path):
                partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def write_folder(path: Path, contents: Mapping[str, bytes | str], *, force: bool) -> None:
    """Write a folder of files completely or not at all.

    Args:
        contents: file name in the folder → content.
        force: replace an existing folder; it stays until the new one is complete.
    """
    with new_folder(path, force=force) as partial:
        write_into(partial, contents)


def write_into(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Write files into a folder that :func:`new_folder` yielded."""
    for name, content in contents.items():
        _write_synced(folder / name, content)


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder to write into; it moves to ``path`` when the block ends and is removed if the block fails."""
    require_absent(path, force)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial, old = _beside(path, "partial"), None
        try:
            partial.mkdir()
            yield partial
            if path.exists() or path.is_symlink():
                old = path.replace(_beside(path, "old"))
            partial.replace(path)
        except BaseException:
            if old is not None:
                old.replace(path)
            raise
        finally:
            _remove(partial)
        if old is not None:
            _remove(old)


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path to write a file to; it moves to ``path`` when the block ends and is removed if the block fails."""
    require_absent(path, force)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial = _beside(path, "partial")
        try:
            yield partial
            partial.replace(path)
        finally:
            _remove(partial)


def _write_synced(path: Path, content: bytes | str) -> None:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def _beside(path: Path, word: str) -> Path:
    """A name beside ``path`` that only this process uses."""
    return path.with_name(f".{path.name}.{word}-{os.getpid()}")


def _sweep(path: Path) -> None:
    """Remove the leftovers of dead processes beside ``path``.

    Leftovers under this process's own id are removed as well: containers reuse ids.
    """
    name = glob.escape(path.name)
    leftovers = list(path.parent.glob(f".{name}.partial-*"))
    if path.exists():  # without it, the old content of a replaced folder is the only copy: never remove it
        leftovers += path.parent.glob(f".{name}.old-*")
    for leftover in leftovers:
        pid = leftover.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
            _remove(leftover)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
