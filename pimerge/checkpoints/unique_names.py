"""Names that distinguish folders of one name, such as two ``checkpoint-500``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class NamedPath(Protocol):
    """An expert or a checkpoint: its files and its plain name."""

    @property
    def path(self) -> Path:
        """Its folder or file."""

    @property
    def name(self) -> str:
        """Its name."""


def unique_names(named: Sequence[NamedPath], taken: Mapping[str, Path] | None = None) -> list[str]:
    """One name each: the plain name, or for different folders of one name the shortest ending of the path that differs.

    The same folder given twice keeps its name.

    Args:
        taken: names that others have already → their paths.

    >>> from types import SimpleNamespace as Item
    >>> items = [Item(path=Path(path), name=Path(path).name) for path in ("/x/a/step-5", "/x/b/step-5", "/x/c")]
    >>> unique_names(items)
    ['a/step-5', 'b/step-5', 'c']
    """
    own = [each.path.resolve() for each in named]
    paths: dict[str, set[Path]] = {}
    for name, path in [*zip((each.name for each in named), own, strict=True), *_resolved(taken)]:
        paths.setdefault(name, set()).add(path)
    known = {path: name for name, path in _resolved(taken)}
    return [
        known.get(path) or _shortest(each.name, path, paths[each.name]) for each, path in zip(named, own, strict=True)
    ]


def _resolved(taken: Mapping[str, Path] | None) -> list[tuple[str, Path]]:
    return [(name, path.resolve()) for name, path in (taken or {}).items()]


def _shortest(name: str, path: Path, others: set[Path]) -> str:
    """The shortest ending of a path that no other has; the plain name if there is no other."""
    if len(others) == 1:
        return name
    endings = {other: _parts(name, other) for other in others}
    for length in range(2, 1 + max(map(len, endings.values()))):
        shown = {other: parts[-length:] for other, parts in endings.items()}
        if len(set(shown.values())) == len(others):
            return "/".join(shown[path])
    return str(path)


def _parts(name: str, path: Path) -> tuple[str, ...]:
    """The parts of a path that ends in a name; of a snapshot in the Hub's local cache, those of its repository."""
    if path.parent.name == "snapshots":
        return (f"{path.name[:8]}", *path.parents[1].name.split("--")[1:])
    return (*path.parts[1:-1], name)
