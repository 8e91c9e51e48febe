"""What a measure sees of the store: its members, and their tensors, a few layers of all members at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.safetensors_file import TensorFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

INPUT, OUTPUT, GRADIENT = "input", "output", "gradient"
"""The parts of a layer's second moments, see :mod:`pimerge.embedding.layer_moments`."""
UPDATE = "update"
"""Beside them: its ΔW in random directions, see :func:`pimerge.embedding.random_projection.update_embedding`."""
AT_ONCE = 8
"""Tensors or modules that are read of each member at a time: a file is opened seldom, and memory stays small."""

Part = TypeVar("Part")
Member = TypeVar("Member")


@dataclass(frozen=True)
class StoreView:
    """One expert as a measure sees it; tensors are read when they are asked for.

    Attributes:
        expert: its adapter.
        diagonal: of its Fisher; None for a measure that does not need it. ``marginals``: the same.
    """

    expert: Expert
    diagonal: TensorFile | None = None
    second_moments: TensorFile | None = None

    @property
    def parameters(self) -> list[str]:
        """The keys of the expert's tensors in its file, in order."""
        return self.expert.keys

    def fisher(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The diagonal Fisher of some tensors, by their keys."""
        assert self.diagonal is not None
        return self.diagonal.arrays(keys)

    def layers(self, part: str) -> list[str]:
        """The layers that have this part of the second moments, or an update."""
        assert self.second_moments is not None
        return sorted(
            name.removeprefix(f"{part}.") for name in self.second_moments.entries if name.startswith(f"{part}.")
        )

    def moments(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The tensors ``PART.LAYER`` of some names, where there are any."""
        assert self.second_moments is not None
        return self.second_moments.arrays(name for name in names if name in self.second_moments.entries)


def by_name(
    members: Sequence[Member], names: Sequence[str], read: Callable[[Member, Sequence[str]], dict[str, Part]]
) -> Iterator[tuple[str, dict[int, Part]]]:
    """For each name, member → what it has under that name; :data:`AT_ONCE` names are held at once.

    Args:
        read: a member's parts of some names, of those that it has.
    """
    for start in range(0, len(names), AT_ONCE):
        chosen = names[start : start + AT_ONCE]
        found = [read(member, chosen) for member in members]
        for name in chosen:
            yield name, {index: parts.pop(name) for index, parts in enumerate(found) if name in parts}


def rows_by_name(
    members: Sequence[Member], names: Sequence[str], read: Callable[[Member, Sequence[str]], dict[str, NDArray[Any]]]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """For each name, (members × numbers) the tensors under it, each in a row; 0 for a member without it.

    Args:
        read: as of :func:`by_name`.
    """
    for name, found in by_name(members, names, read):
        rows = np.empty((len(members), next(iter(found.values())).size))
        for index in range(len(members)):
            rows[index] = found[index].ravel() if index in found else 0
        yield name, rows
