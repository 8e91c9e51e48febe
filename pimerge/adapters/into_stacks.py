"""Merge updates of bare parameters, such as a mixture's experts, into the tensors of a full checkpoint.

A checkpoint stores a stacked parameter as one tensor (E, rows, columns), or as one matrix for each layer of each
expert, as earlier models have them. A transposed parameter has d_in rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pimerge.adapters.fused_experts import layer_of_expert
from pimerge.adapters.lora_module import BareParameter, Factors, LoraModule
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import Names, is_fan_in_first, match
from pimerge.checkpoints.safetensors_file import PIECE
from pimerge.core.errors import PimergeError, Problems

# What transformers does to the layers of the experts when it loads them, so that each remains a part of the rows.
_STACKED = (("MergeModulelist",), ("MergeModulelist", "Concatenate"))
# Matrices that it turns only if their shape is not that of the parameter.
_TURNED = ("Transpose",)


@dataclass(frozen=True)
class PlacedMatrix:
    """Where the update of a matrix goes.

    Attributes:
        module: the module whose update is added.
        index: the place of the matrix in the stored tensor; 0 if the tensor is a single matrix.
        half: 0 or 1 if the stored matrix has only the upper or the lower half of the rows of the update.
    """

    module: str
    index: int = 0
    half: int | None = None


Placed = dict[str, tuple[PlacedMatrix, ...]]
"""Key → the matrices whose updates are added to its tensor."""


def is_stacked(layout: LoraModule) -> bool:
    """Whether a module's weight is not a tensor of its own with the name of a layer's weight."""
    place = layout.parameter
    return place is not None and (place.count > 1 or place.name != "weight")


def place_matrices(
    checkpoint: Checkpoint, names: Names, layouts: Mapping[str, LoraModule], problems: Problems
) -> tuple[Placed, set[str]]:
    """Find the tensors that the updates of bare parameters change, and those of them that are stored transposed.

    Args:
        layouts: the modules for which :func:`is_stacked` holds.
    """
    layers = _layers_on_disk(checkpoint, names)
    found: dict[str, list[PlacedMatrix]] = {}
    keys: dict[str, str] = {}
    transposed: set[str] = set()
    for name, layout in layouts.items():
        place = layout.parameter
        assert place is not None
        with problems.collected():
            if own := layers.get(place.full_name):
                halves = own.get(place.index, {})
                _require_layers(checkpoint, layout, halves, len(own))
                for half, key in halves.items():
                    found.setdefault(key, []).append(PlacedMatrix(name, 0, half))
                continue
            key = keys.get(place.full_name) or _key_of(names, place)
            keys[place.full_name] = key
            if _is_transposed(checkpoint, key, layout, names):
                transposed.add(key)
            found.setdefault(key, []).append(PlacedMatrix(name, place.index))
    return {key: tuple(each) for key, each in found.items()}, transposed


def _layers_on_disk(checkpoint: Checkpoint, names: Names) -> dict[str, dict[int, dict[int | None, str]]]:
    """Stacked parameter → place of an expert → half of its rows → key, for layers of experts that are stored apart."""
    found: dict[str, dict[int, dict[int | None, str]]] = {}
    for key in checkpoint.home:
        layer = layer_of_expert(key.removesuffix(".weight"))
        if layer is not None:
            parameter, index, half = layer
            today = names.rename(key) if names.known else parameter
            if not names.known or names.converted.get(today) in _STACKED:
                half = half if today.endswith(parameter.rpartition(".")[2]) else None  # an expert without a gate
                found.setdefault(today, {}).setdefault(index, {})[half] = key
    return found


def _key_of(names: Names, place: BareParameter) -> str:
    turned = replace(names, converted={}, parameter={key: names.rename(key) for key in names.parameter})
    is_turned = names.converted.get(place.full_name) == _TURNED
    return match(turned if is_turned else names, place.full_name, f"parameter '{place.full_name}'")


def _require_layers(checkpoint: Checkpoint, layout: LoraModule, layers: Mapping[int | None, str], count: int) -> None:
    """Check that the layers of an expert, by the half of the rows, have the shape of its update."""
    place = layout.parameter
    assert place is not None
    rows = 0
    for key in layers.values():
        dtype, shape = checkpoint.entry(key).dtype, checkpoint.entry(key).shape
        if dtype not in FLOATS:
            raise PimergeError(f"'{key}' is stored as {dtype}", f"expected {', '.join(FLOATS)}")
        rows += shape[0] if shape[1:] == (layout.d_in,) else 0
    if rows != layout.d_out or count != place.count or set(layers) not in ({None}, {0, 1}):
        shapes = ", ".join(f"'{key}' is {checkpoint.entry(key).shape}" for key in layers.values()) or "none is stored"
        raise PimergeError(
            f"'{layout.name}': ΔW is {(layout.d_out, layout.d_in)}, one of {place.count} matrices, but the checkpoint "
            f"has {count} experts; of this one's layers, {shapes}",
            "the adapter was trained on another base",
        )


def _is_transposed(checkpoint: Checkpoint, key: str, layout: LoraModule, names: Names) -> bool:
    place, entry = layout.parameter, checkpoint.entry(key)
    assert place is not None
    if entry.dtype not in FLOATS:
        raise PimergeError(f"'{key}' is stored as {entry.dtype}", f"expected {', '.join(FLOATS)}")
    plain, turned = (layout.d_out, layout.d_in), (layout.d_in, layout.d_out)
    count, stored = math.prod(entry.shape[:-2]), entry.shape[-2:]
    if count != place.count or stored not in (plain, turned):
        raise PimergeError(
            f"'{layout.name}': ΔW is {plain}, one of {place.count} matrices, but '{key}' is {entry.shape}",
            "the adapter was trained on another base",
        )
    if plain != turned or len(entry.shape) == 2:
        return stored != plain
    if not names.known:
        raise PimergeError(
            f"'{key}' is {entry.shape}, and only the model's code says whether its matrices are transposed",
            "merge into a folder with its config.json, of a model that transformers knows",
        )
    return is_fan_in_first(names, place.module)


def stacked_pieces(
    checkpoint: Checkpoint,
    key: str,
    placed: Sequence[PlacedMatrix],
    update: Callable[[str], Factors],
    *,
    transposed: bool,
) -> Iterator[Tensor]:
    """Each W + s·B·A of a stored tensor in blocks of rows, flattened; matrices without an update stay unchanged."""
    file = checkpoint.home[key]
    entry = file.entries[key]
    kind = torch.float64 if entry.dtype == "F64" else torch.float32
    rows, columns = entry.shape[-2:]
    step = max(1, PIECE // (16 * columns))
    by_index = {each.index: each for each in placed}
    for index in range(math.prod(entry.shape[:-2])):
        factors = placed_factors(by_index[index], update) if index in by_index else None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first = (index * rows + start) * columns
            block = file.read_part(key, first, first + (stop - start) * columns)
            if factors is not None:
                A, B = factors.A.cpu().to(kind), factors.B.cpu().to(kind)
                left, right = (A.T, B.T) if transposed else (B, A)
                wide = block.to(kind).view(-1, columns)
                block = torch.addmm(wide, left[start:stop], right, alpha=factors.scaling).view(-1)
            yield block


def placed_factors(place: PlacedMatrix, update: Callable[[str], Factors]) -> Factors:
    """The factors of what is added to a stored matrix."""
    factors = update(place.module)
    if place.half is None:
        return factors
    return replace(factors, B=factors.B.chunk(2)[place.half])
