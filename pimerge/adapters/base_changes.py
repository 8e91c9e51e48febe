"""Changes of a base by experts without ΔW: tensors that replace parameters, and vectors that scale them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from pimerge.adapters.tensor_sets import BaseChange, Effect
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import Names, is_fan_in_first, match
from pimerge.checkpoints.safetensors_file import PIECE
from pimerge.core.errors import PimergeError, Problems

_OTHER_BASE = "the adapter was trained on another base"


class Axis(StrEnum):
    """The axis of a stored weight that a vector scales."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class PlannedChange:
    """A change of one stored tensor.

    Attributes:
        key: key of the adapter's tensor.
        axis: the axis that is scaled; None if the tensor is replaced.
        rows: the rows that are replaced, if only some are.
    """

    key: str
    axis: Axis | None
    rows: tuple[int, ...] = ()


def plan_changes(
    checkpoint: Checkpoint, names: Names, changes: Sequence[BaseChange], *, fan_in_fan_out: bool, problems: Problems
) -> dict[str, PlannedChange]:
    """Key in the checkpoint → its change; a parameter that is missing or has another shape is a problem.

    Args:
        fan_in_fan_out: whether weights are stored (d_in × d_out) where the model is unknown.
    """
    found: dict[str, PlannedChange] = {}
    for change in changes:
        with problems.collected():
            try:
                key = match(names, change.parameter, f"'{change.parameter}'")
            except PimergeError:
                if change.is_optional:
                    continue
                raise
            shape = checkpoint.entry((names.shared or {}).get(key, key)).shape
            module = change.parameter.removesuffix(".weight")
            turned = is_fan_in_first(names, module) if names.known else fan_in_fan_out
            found[key] = PlannedChange(change.key, _axis(change, shape, turned), change.rows)
            if checkpoint.entry((names.shared or {}).get(key, key)).dtype not in FLOATS:
                raise PimergeError(f"'{key}' is not stored as floating-point numbers", "use the original checkpoint")
    shared = names.shared or {}  # tied layers have the same rows, which stay tied
    return {key: each for key, each in found.items() if not (each.rows and shared.get(key) in found)}


def _axis(change: BaseChange, shape: tuple[int, ...], turned: bool) -> Axis | None:
    if change.effect is Effect.ROWS_REPLACED:
        if shape[1:] != change.shape[1:] or max(change.rows) >= shape[0]:
            raise PimergeError(
                f"'{change.parameter}' of the checkpoint is {shape}, but the adapter holds the rows of the tokens "
                f"{', '.join(map(str, change.rows[:8]))}, of shape {change.shape}",
                "tokens beyond its rows were added before the training, and the adapter does not hold them all: merge "
                "into the checkpoint with the added tokens",
            )
        return None
    if change.effect is Effect.REPLACED:
        if shape != change.shape:
            raise PimergeError(f"'{change.parameter}' is {change.shape}, the checkpoint's is {shape}", _OTHER_BASE)
        return None
    length, on_inputs = math.prod(change.shape), change.effect is Effect.SCALED_INPUTS
    axis = Axis.COLUMNS if on_inputs is not (turned and len(shape) == 2) else Axis.ROWS
    size = shape[0] if axis is Axis.ROWS else shape[1] if len(shape) > 1 else 0
    is_grouped = axis is Axis.COLUMNS and len(shape) > 2 and size and length % size == 0
    if length != size and not is_grouped:
        raise PimergeError(f"'{change.parameter}' is {shape}, but the adapter scales {length} numbers", _OTHER_BASE)
    return axis


def changed_pieces(
    checkpoint: Checkpoint, source: str, change: PlannedChange, tensors: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Yield the new values of a stored tensor, flattened, in the memory of a block of rows."""
    tensor = tensors[change.key]
    if change.rows:
        yield from _with_rows(checkpoint, source, change.rows, tensor)
        return
    if change.axis is None:
        yield tensor.reshape(-1)
        return
    file = checkpoint.home[source]
    entry = file.entries[source]
    kind = torch.float64 if entry.dtype == "F64" else torch.float32
    factor = _factors(tensor.reshape(-1).to(kind), entry.shape, change.axis)
    columns = math.prod(entry.shape[1:])
    step = max(1, PIECE // (16 * columns))
    for start in range(0, entry.shape[0], step):
        stop = min(start + step, entry.shape[0])
        block = file.read_part(source, start * columns, stop * columns).to(kind).view(-1, columns)
        yield (block * factor(start, stop)).view(-1)


def _with_rows(checkpoint: Checkpoint, source: str, rows: Sequence[int], tensor: Tensor) -> Iterator[Tensor]:
    """Yield a stored tensor with other rows, in blocks of rows."""
    file, shape = checkpoint.home[source], checkpoint.entry(source).shape
    columns = math.prod(shape[1:])
    step = max(1, PIECE // (16 * columns))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = file.read_part(source, start * columns, stop * columns).view(-1, columns)
        for row, values in zip(rows, tensor, strict=True):
            if start <= row < stop:
                block[row - start] = values.to(block.dtype)
        yield block.view(-1)


def _factors(vector: Tensor, shape: tuple[int, ...], axis: Axis) -> Callable[[int, int], Tensor]:
    """Rows → what they are multiplied by; in a grouped convolution the columns of each group have their own numbers."""
    if axis is Axis.ROWS:
        return lambda start, stop: vector[start:stop, None]
    groups = len(vector) // shape[1]
    by_group = vector.view(groups, shape[1]).repeat_interleave(math.prod(shape[2:]), dim=1)
    return lambda start, stop: by_group[torch.arange(start, stop) // (shape[0] // groups)]
