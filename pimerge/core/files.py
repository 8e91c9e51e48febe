"""Read, hash and write files; files and folders appear complete or not at all.

Everything is written beside its destination and then renamed, so a killed process or a full disk leaves the destination
unchanged. The next start with the same destination clears up what a killed process left: see
:mod:`pimerge.core.placement`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from filecmp import cmp
from pathlib import Path
from typing import Any

from pimerge.core.errors import AlreadyDone, PimergeError
from pimerge.core.hash_cache import sha256_of
from pimerge.core.placement import (
    has_leftovers,
    key_of,
    locked,
    partial_of,
    place,
    place_together,
    remove,
    write_synced,
)
from pimerge.core.progress import Note, unheard

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
    errno.ENOENT: "no file can be created there: choose another --output",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some programs",
    errno.ENOMEM: "the memory is full: close some programs",
    errno.ESTALE: "the network disk has lost the file: mount it again, or choose another --output",
}


def disk_hint(code: int) -> str:
    """What the user can do about an error number of the operating system."""
    return _DISK_ERRORS.get(code, "check the disk, or choose another --output")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system while writing ``path``, or copying into it, into a PimergeError."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EBADF):  # no error of the disk: a bug
            raise
        code = error.errno or 0
        if _is_of_a_source(error.filename, path):
            raise PimergeError(f"cannot read '{error.filename}': {os.strerror(code)}", disk_hint(code)) from error
        raise PimergeError(f"cannot write '{path}': {os.strerror(code)}", disk_hint(code)) from error


def _is_of_a_source(name: object, output: Path) -> bool:
    """Whether an error names a file that is copied into an output, not the output or what stands beside it."""
    if not isinstance(name, str) or ".pimerge-" in name or not os.path.isfile(name):
        return False
    named, absolute = Path(name).absolute(), output.absolute()
    return not (named.is_relative_to(absolute) or absolute.is_relative_to(named))


def require_absent(path: Path, force: bool) -> None:
    """Refuse to overwrite ``path`` without ``force``, and always if it is or contains the working folder."""
    with disk_errors(path):
        exists = path.exists() or path.is_symlink()
    if exists and Path.cwd().is_relative_to(path.resolve()):
        raise PimergeError(f"'{path}' is or contains the working folder", "choose another --output")
    if exists and not force:
        raise PimergeError(f"'{path}' already exists", "pass --force to replace it, or choose another --output")


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def require_no_device(path: Path) -> None:
    """Refuse a pipe, a socket or a device, which could be read without an end."""
    with suppress(OSError, ValueError):  # what opens it tells why it cannot be read
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise PimergeError(f"'{path}' is a pipe, a socket or a device", "expected a file: copy it to one")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; :mod:`pimerge.core.hash_cache` caches it for large files."""
    require_no_device(path)
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
    require_no_device(path)
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
    """Write several files of one folder: all of them or none.

    If the process is stopped while it moves them to their places, the next one that writes there moves the rest.
    """
    key = next(iter(contents)) if len(contents) == 1 else key_of(contents)
    with output_lock(key):
        try:
            for path, data in contents.items():
                with disk_errors(path):
                    _refuse_folder(path)
                    write_synced(partial_of(path), data)
            with disk_errors(key):
                if len(contents) == 1:
                    partial_of(key).replace(key)
                else:
                    place_together(list(contents), key)
        finally:
            for path in contents:
                with suppress(OSError):
                    partial_of(path).unlink(missing_ok=True)


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
        write_synced(folder / name, content)


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder to write into; it moves to ``path`` when the block ends and is removed if the block fails.

    Without ``force``, an existing folder is refused at the end, as :class:`AlreadyDone` if its content is the same.
    """
    with _new(path, force) as partial:
        with disk_errors(path):
            partial.mkdir()
        yield partial


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path to write a file to; like :func:`new_folder`."""
    with _new(path, force) as partial:
        with disk_errors(path):
            _refuse_folder(path)
        yield partial


@contextmanager
def output_lock(path: Path, note: Note = unheard) -> Iterator[None]:
    """Hold the name of an output while a command works on it: see :func:`pimerge.core.placement.locked`."""
    with ExitStack() as stack:
        with disk_errors(path):
            stack.enter_context(locked(path, note))
        yield


def put_in_order(path: Path) -> None:
    """Clear up what a stopped process left beside an output that is not written again."""
    if has_leftovers(path):
        with output_lock(path):
            pass


@contextmanager
def _new(path: Path, force: bool) -> Iterator[Path]:
    with output_lock(path), disk_errors(path):
        require_absent(path, True)
        partial = partial_of(path)
        try:
            yield partial
            if not force and _is_same(partial, path):
                raise AlreadyDone(path)
            require_absent(path, force)
            place(partial, path)
        finally:
            remove(partial)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are files of the same content, or folders of such files."""
    if one.is_dir():
        names = sorted(os.listdir(one))
        return (
            other.is_dir() and names == sorted(os.listdir(other)) and all(_is_same(one / x, other / x) for x in names)
        )
    return one.is_file() and other.is_file() and cmp(one, other, shallow=False)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
