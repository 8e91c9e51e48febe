"""Cache the SHA-256 of large files between commands.

A file counts as unchanged if its size, its inode and the times of its last write (mtime) and last change (ctime) are
unchanged, as in git's index: the system sets ctime at every write, and programs cannot set it back. Files that changed
within the last two seconds are not cached, since a file system with coarse timestamps could give the next write the
same time. Where the cache cannot be written, files are hashed every time.
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
"""The size from which files are cached; hashing a smaller file is faster than looking it up."""
UNSETTLED_SECONDS = 2.0
_lock = Lock()  # one connection serves all threads


def sha256_of(file: BufferedReader) -> str:
    """SHA-256 of an open file's content, in hexadecimal; an OSError of the file is not caught."""
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
    """The key of a file (None for a small one) and a text that changes whenever its content changes."""
    found = os.fstat(file.fileno())
    key = f"{found.st_dev}:{found.st_ino}" if found.st_size >= LEAST_BYTES else None
    return key, f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _is_settled(file: BufferedReader) -> bool:
    found = os.fstat(file.fileno())
    return time.time() - max(found.st_mtime, found.st_ctime) > UNSETTLED_SECONDS


def _ask(statement: str, *values: str) -> str | None:
    """The first value of the first row; None if there is no row or the cache fails."""
    try:
        with _lock:
            row = _connection(cache_path(), os.getpid()).execute(statement, values).fetchone()
    except sqlite3.Error:
        return None
    return row[0] if row else None


@cache
def _connection(path: Path, process: int) -> sqlite3.Connection:
    """Open the cache; one in memory if the file cannot be created or is not a database."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _opened(str(path))
    except (OSError, sqlite3.Error):
        return _opened(":memory:")


def _opened(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=1, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")  # hashes that a power cut loses are computed again
    connection.execute("CREATE TABLE IF NOT EXISTS hashes (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT)")
    return connection
