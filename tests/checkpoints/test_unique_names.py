"""Folders of one name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pimerge.checkpoints.unique_names import unique_names


@dataclass
class Named:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


def names(*paths: str, **taken: str) -> list[str]:
    return unique_names([Named(Path(path)) for path in paths], {name: Path(path) for name, path in taken.items()})


def test_the_shortest_ending_that_differs_is_the_name() -> None:
    assert names("/p/a/x", "/p/b/x", "/p/y") == ["a/x", "b/x", "y"]
    assert names("/p/1/run/x", "/p/2/run/x", "/p/2/other/x") == ["1/run/x", "2/run/x", "2/other/x"]
    assert names("/x", "/a/x", "/b/a/x") == ["x", "a/x", "b/a/x"]


def test_one_folder_has_one_name() -> None:
    assert names("/p/x", "/p/x", "/p/y/../x") == ["x"] * 3
    assert names("/p/a/x", "/p/a/x", "/p/b/x") == ["a/x", "a/x", "b/x"]


def test_names_that_others_have_stay_theirs() -> None:
    assert names("/p/a/x", "/p/b/x", x="/p/a/x") == ["x", "b/x"]
    assert names("/p/b/x", x="/p/a/x") == ["b/x"]


def test_repositories_of_one_name_are_told_apart_by_their_owners() -> None:
    cache = "/hub/models--{}--lora/snapshots/{}"
    first, second = cache.format("ann", "a" * 40), cache.format("bob", "b" * 40)

    class Snapshot(Named):
        name = "lora"  # type: ignore[assignment]

    assert unique_names([Snapshot(Path(first)), Snapshot(Path(second))]) == ["ann/lora", "bob/lora"]
