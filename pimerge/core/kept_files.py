"""The files that pimerge keeps between commands: hashes of large files, checkpoints of trainings, runs of comparisons.

None of them is needed: without them, commands take longer. A training that was stopped starts again, and a comparison
makes all its runs again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pimerge.core.hash_cache import cache_path
from pimerge.core.placement import locked, remove

_TRAINING = re.compile(r"\.(.+)\.training-[0-9a-f]{12}")
_LEFT = re.compile(r"\.(.+)\.pimerge-(?:partial|old|lock|set)")
_RUNS = re.compile(r"(.+)\.runs")


@dataclass(frozen=True)
class KeptFiles:
    """A file or folder that pimerge keeps.

    Attributes:
        what: what it is for.
        size: in bytes.
        output: the output that it belongs to; None for the hashes.
    """

    path: Path
    what: str
    size: int
    output: Path | None = None

    def clean(self) -> bool:
        """Remove it; False if a process is writing its output.

        What a stopped process left is put in order: an output that it had set aside comes back.
        """
        if self.output is None:
            remove(self.path)
            return True
        try:
            with locked(self.output, wait=False):
                remove(self.path)
        except BlockingIOError:
            return False
        return True


def find_kept(folder: Path) -> list[KeptFiles]:
    """The files that pimerge keeps below a folder, and the hashes in the user's cache."""
    hashes = cache_path().parent
    found = [KeptFiles(hashes, "hashes of large files", _size(hashes))] if hashes.is_dir() else []
    return [*found, *sorted(_below(folder), key=lambda kept: str(kept.path))]


def _below(folder: Path) -> Iterator[KeptFiles]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue
        if match := _TRAINING.fullmatch(path.name):
            yield KeptFiles(path, "checkpoints of a training", _size(path), path.with_name(match[1]))
        elif match := _LEFT.fullmatch(path.name):
            yield KeptFiles(path, "left by a stopped process", _size(path), path.with_name(match[1]))
        elif path.is_dir() and (match := _RUNS.fullmatch(path.name)) and any(path.glob("*.json")):
            yield KeptFiles(path, "runs of a comparison", _size(path), path.with_name(match[1]))
        elif path.is_dir() and not path.name.startswith("."):
            yield from _below(path)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
