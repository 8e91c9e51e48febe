"""SHA-256 of large files, remembered from one command to the next.

A file is taken to hold what it held if its size, its inode and the times of its last write and last change are as they
were, as in git's index: the system sets the time of the last change at every write, and no program can set it back.
What changed within the last two seconds is not remembered, since a file system that counts coarsely could give the
next write the same time. Where nothing can be kept, files are hashed anew.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from functools import cache
from io import BufferedReader
from pathlib import Path
from threading import Lock

LEAST_BYTES = 2**20
"""Smaller files are hashed sooner than looked up."""
UNSETTLED_SECONDS = 2.0
_lock = Lock()  # one connection serves all threads


def sha256_of(file: BufferedReader) -> str:
    """SHA-256 of an open file's content, in hexadecimal.

    Raises:
        OSError: if the file cannot be read.
    """
    key, state = _state_of(file)
    if key is not None and (known := _ask("SELECT sha256 FROM hashes WHERE file = ? AND state = ?", key, state)):
        return known
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if key is not None and _state_of(file) == (key, state) and _is_settled(file):
        _ask("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", key, state, sha256)
    return sha256


def cache_path() -> Path:
    """Where the hashes are kept: ``pimerge/hashes.sqlite`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "pimerge" / "hashes.sqlite"


def _state_of(file: BufferedReader) -> tuple[str | None, str]:
    """Which file it is, None for a small one, and what changes when its content does."""
    found = os.fstat(file.fileno())
    key = f"{found.st_dev}:{found.st_ino}" if found.st_size >= LEAST_BYTES else None
    return key, f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _is_settled(file: BufferedReader) -> bool:
    found = os.fstat(file.fileno())
    return time.time() - max(found.st_mtime, found.st_ctime) > UNSETTLED_SECONDS


def _ask(statement: str, *values: str) -> str | None:
    """The first value of the first row; None if there is none, or the cache is of no use."""
    try:
        with _lock:
            row = _connection(cache_path(), os.getpid()).execute(statement, values).fetchone()
    except sqlite3.Error:
        return None
    return row[0] if row else None


@cache
def _connection(path: Path, process: int) -> sqlite3.Connection:
    """The cache; one in memory where the disk has none and takes none, or something else has its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _opened(str(path))
    except (OSError, sqlite3.Error):
        return _opened(":memory:")


def _opened(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=1, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")  # what a power cut takes is hashed again
    connection.execute("CREATE TABLE IF NOT EXISTS hashes (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT)")
    return connection
