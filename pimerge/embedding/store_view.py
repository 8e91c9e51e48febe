"""Store views: the embeddings of experts as a measure reads them, a few layers of all experts at a time."""

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
"""Parts of a layer's second moments, see :mod:`pimerge.embedding.layer_moments`."""
UPDATE = "update"
"""A layer's ΔW in random directions, see :func:`pimerge.embedding.random_projection.update_embedding`."""
AT_ONCE = 8
"""Number of tensors or modules read from each expert at a time, to open files rarely and bound the memory."""

Part = TypeVar("Part")
Member = TypeVar("Member")


@dataclass(frozen=True)
class StoreView:
    """An expert of the store as a measure reads it; tensors are read on demand.

    Attributes:
        expert: the expert.
        diagonal: the diagonal of its Fisher information; None if the measure does not need it.
        second_moments: the second moments of its layers; None if the measure does not need them.
    """

    expert: Expert
    diagonal: TensorFile | None = None
    second_moments: TensorFile | None = None

    @property
    def parameters(self) -> list[str]:
        """The keys of the expert's tensors in its file, in order."""
        return self.expert.keys

    def fisher(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read the diagonal Fisher information of some tensors, by their keys."""
        assert self.diagonal is not None
        return self.diagonal.arrays(keys)

    def layers(self, part: str) -> list[str]:
        """Return the layers that have this part of the second moments, or an update."""
        assert self.second_moments is not None
        return sorted(
            name.removeprefix(f"{part}.") for name in self.second_moments.entries if name.startswith(f"{part}.")
        )

    def moments(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read the tensors of some names ``PART.LAYER``, as far as they exist."""
        assert self.second_moments is not None
        return self.second_moments.arrays(name for name in names if name in self.second_moments.entries)


def by_name(
    members: Sequence[Member], names: Sequence[str], read: Callable[[Member, Sequence[str]], dict[str, Part]]
) -> Iterator[tuple[str, dict[int, Part]]]:
    """Yield each name with index of a member → its part of that name; :data:`AT_ONCE` names are in memory at a time.

    Args:
        read: reads a member's parts of some names, as far as they exist.
    """
    for start in range(0, len(names), AT_ONCE):
        chosen = names[start : start + AT_ONCE]
        found = [read(member, chosen) for member in members]
        for name in chosen:
            yield name, {index: parts.pop(name) for index, parts in enumerate(found) if name in parts}


def rows_by_name(
    members: Sequence[Member], names: Sequence[str], read: Callable[[Member, Sequence[str]], dict[str, NDArray[Any]]]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each name with the members' tensors of that name as rows (members × numbers); 0 for a missing tensor.

    Args:
        read: see :func:`by_name`.
    """
    for name, found in by_name(members, names, read):
        rows = np.empty((len(members), next(iter(found.values())).size))
        for index in range(len(members)):
            rows[index] = found[index].ravel() if index in found else 0
        yield name, rows
