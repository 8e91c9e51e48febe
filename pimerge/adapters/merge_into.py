"""Merge a LoRA update into a full checkpoint: W' = W + s·B·A, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pimerge.adapters.base_changes import PlannedChange, changed_pieces, plan_changes
from pimerge.adapters.into_config import fitted, shares_weight, untied, vocabulary_of
from pimerge.adapters.into_stacks import Placed, is_stacked, place_matrices, stacked_pieces
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.tensor_sets import BaseChange
from pimerge.checkpoints.checkpoint import Checkpoint, require_weights
from pimerge.checkpoints.dtypes import FLOATS, dtype_name
from pimerge.checkpoints.key_mapping import Names, is_fan_in_first, match, match_modules, names_of
from pimerge.checkpoints.safetensors_file import PIECE
from pimerge.checkpoints.writer import flat_pieces, write_like
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Track, silent


@dataclass(frozen=True)
class MergeIntoPlan:
    """The tensors of a checkpoint that a merge changes; see :func:`plan_merge_into`.

    Attributes:
        weights, biases: key → module whose update is added.
        heads: key → parameter name of the head tensor that replaces it.
        changes: key → how an expert without ΔW changes it.
        stacks: key → the matrices of bare parameters whose updates are added.
        copies: keys that are added → key of the stored tensor that they shared before.
        transposed: keys of ``weights`` and ``stacks`` that are stored as (d_in × d_out).
        untied: whether tied weights become separate tensors.
        config: the changed content of ``config.json``; None keeps the file byte for byte.
        resized: the number of tokens of the result, if its vocabulary has another size than the checkpoint's.
    """

    checkpoint: Checkpoint
    weights: dict[str, str]
    biases: dict[str, str]
    heads: dict[str, str]
    copies: dict[str, str]
    transposed: frozenset[str]
    untied: bool
    config: dict[str, Any] | None
    resized: int | None = None
    changes: dict[str, PlannedChange] = field(default_factory=dict)
    stacks: Placed = field(default_factory=dict)

    def source(self, key: str) -> str:
        """The stored key whose values a written tensor starts from."""
        return self.copies.get(key, key)


@dataclass(frozen=True)
class MergedInto:
    """The checkpoint that :func:`merge_into` wrote.

    Attributes:
        modules: number of modules whose update was added, or of tensors that an expert without ΔW changed.
        untied: whether tied weights became separate tensors.
        size: bytes of all tensors.
    """

    modules: int
    untied: bool
    size: int


def plan_merge_into(
    checkpoint: Checkpoint,
    layouts: Mapping[str, LoraModule],
    *,
    fan_in_fan_out: bool = False,
    head: Mapping[str, Tensor] | None = None,
    fields: Mapping[str, Any] | None = None,
    trained_in: str | None = None,
    changes: Sequence[BaseChange] = (),
) -> MergeIntoPlan:
    """Check that an adapter fits a checkpoint; nothing is computed or written.

    Args:
        fan_in_fan_out: the field of the adapter's config; it decides how a square weight is stored where the model
            is unknown.
        head: parameter name → tensor that replaces the checkpoint's or is added.
        fields: fields of ``config.json`` that the head needs, such as ``id2label``.
        trained_in: the class of the model that has the head, for a checkpoint whose own class has no place for it.
        changes: the changes of the base's parameters by experts without ΔW.
    """
    require_weights(checkpoint)
    stored = None if head or fan_in_fan_out or changes else _as_stored(checkpoint, layouts)
    if stored is not None:
        return MergeIntoPlan(checkpoint, stored, {}, {}, {}, frozenset(), False, None)
    names, problems = names_of(checkpoint), Problems()
    weights: dict[str, str] = {}
    biases: dict[str, str] = {}
    transposed: set[str] = set()
    stacked = {name: layout for name, layout in layouts.items() if is_stacked(layout)}
    with problems.collected():
        weights = {key: module for module, key in match_modules(names, layouts.keys() - stacked.keys()).items()}
    for key, module in weights.items():
        with problems.collected():
            source = (names.shared or {}).get(key, key)
            if _is_transposed(checkpoint, source, layouts[module], fan_in_fan_out, names):
                transposed.add(key)
        if layouts[module].bias is not None:
            with problems.collected():
                biases[_bias(checkpoint, names, module)] = module
    stacks, turned = place_matrices(checkpoint, names, stacked, problems)
    head = head or {}
    changed = plan_changes(checkpoint, names, changes, fan_in_fan_out=fan_in_fan_out, problems=problems)
    heads = _heads(checkpoint, names, head, {*weights, *biases, *changed, *stacks}, problems)
    problems.raise_any(f"the adapter cannot be merged into '{checkpoint.path}'")
    separate = shares_weight(names, {*weights, *biases, *heads, *changed, *stacks})
    copies = dict(names.shared or {}) if separate else {}
    config = {**checkpoint.config, **(fields or {})}
    if trained_in and any(names.known and names.rename(key) not in names.known for key in heads):
        config = {**config, "architectures": (fields or {}).get("architectures") or [trained_in]}
    if separate:
        config = untied(checkpoint, names, config)
    if heads and not checkpoint.is_file:
        new = {key: checkpoint.entry(source).shape for key, source in copies.items()}
        config = fitted(checkpoint, names, config, new | {key: tuple(head[name].shape) for key, name in heads.items()})
    written = config if config != checkpoint.config and not checkpoint.is_file else None
    size = vocabulary_of(config)
    resized = size if size != vocabulary_of(checkpoint.config) else None
    transposed |= turned
    return MergeIntoPlan(
        checkpoint, weights, biases, heads, copies, frozenset(transposed), separate, written, resized, changed, stacks
    )


def merge_into(
    plan: MergeIntoPlan,
    update: Callable[[str], Factors],
    output: Path,
    *,
    head: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> MergedInto:
    """Write a checkpoint with an adapter's update added; all other tensors stay unchanged.

    W' = W + s·B·A is computed in float32 (float64 for F64) and rounded once. Memory: the factors of one module and a
    block of rows, whatever the size of W.

    Args:
        update: module → its merged factors; called in the order of the checkpoint.
        output: an empty folder, or the path of a file if the checkpoint is a single file.
        head: as for :func:`plan_merge_into`.
        tensors: key in the adapter → merged tensor, for the plan's changes.
        dtype: dtype of all floating tensors; None keeps the dtype of each.
    """
    heads = head or {}
    update_of_matrix = lru_cache(maxsize=4)(update)  # several stored layers can be parts of one matrix

    def change(key: str) -> Iterator[Tensor] | None:
        if key in plan.heads:
            return iter([heads[plan.heads[key]].reshape(-1)])
        if key in plan.changes:
            return changed_pieces(plan.checkpoint, plan.source(key), plan.changes[key], tensors or {})
        if key in plan.weights:
            return _weight(plan, key, update(plan.weights[key]))
        if key in plan.stacks:
            stack, is_turned = plan.stacks[key], key in plan.transposed
            return stacked_pieces(plan.checkpoint, plan.source(key), stack, update_of_matrix, transposed=is_turned)
        if key in plan.biases:
            factors = update(plan.biases[key])
            return iter([_plus_bias(plan.checkpoint.read(plan.source(key)), factors)])
        if key in plan.copies:
            return flat_pieces(plan.checkpoint.home[plan.copies[key]], plan.copies[key])
        return None

    new = {key: _like(plan.checkpoint, source) for key, source in plan.copies.items()}
    for key, name in plan.heads.items():
        known = plan.source(key) in plan.checkpoint.home
        kind = _like(plan.checkpoint, plan.source(key))[0] if known else dtype_name(heads[name].dtype)
        new[key] = (kind, tuple(heads[name].shape))
    size = write_like(plan.checkpoint, output, change, new=new, config=plan.config, dtype=dtype, track=track)
    matrices = {each.module for placed in plan.stacks.values() for each in placed}
    return MergedInto(len(plan.weights) + len(plan.changes) + len(matrices), plan.untied, size)


def _as_stored(checkpoint: Checkpoint, layouts: Mapping[str, LoraModule]) -> dict[str, str] | None:
    """Key → module, if the tensors on disk are enough to tell; None if the model's architecture is needed.

    Building the model's skeleton takes seconds. It is not needed if every module's weight is stored under its own
    name, is certainly (d_out × d_in) (a square one may be a Conv1D's, but those have a bias), cannot be tied to
    another, and has no bias update.
    """
    texts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    vocabulary = {part.get("vocab_size") for part in texts}
    found = {}
    for name, layout in layouts.items():
        key = f"{name}.weight"
        if key not in checkpoint.home or layout.layer != "linear" or layout.bias or layout.d_out in vocabulary:
            return None
        is_square = layout.d_out == layout.d_in
        if checkpoint.entry(key).shape != (layout.d_out, layout.d_in) or (
            is_square and f"{name}.bias" in checkpoint.home
        ):
            return None
        found[key] = name
    return found


def _weight(plan: MergeIntoPlan, key: str, factors: Factors) -> Iterator[Tensor]:
    """W + s·B·A in blocks of rows of the stored weight, flattened."""
    source = plan.source(key)
    file = plan.checkpoint.home[source]
    entry = file.entries[source]
    kind = torch.float64 if entry.dtype == "F64" else torch.float32
    A, B = factors.A.cpu().to(kind), factors.B.cpu().to(kind)
    left, right = (A.T, B.T) if key in plan.transposed else (B, A)
    rows, columns = len(left), right.shape[1]
    step = max(1, PIECE // (16 * columns))  # a quarter of PIECE in float32, since several blocks are in memory at once
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = file.read_part(source, start * columns, stop * columns).to(kind).view(-1, columns)
        yield torch.addmm(block, left[start:stop], right, alpha=factors.scaling).view(-1)


def _plus_bias(bias: Tensor, factors: Factors) -> Tensor:
    """b + s·bias; a module whose merged update has no bias keeps b."""
    if factors.bias is None:
        return bias
    kind = torch.float64 if bias.dtype == torch.float64 else torch.float32
    return bias.to(kind) + factors.scaling * factors.bias.cpu().to(kind)


def _like(checkpoint: Checkpoint, key: str) -> tuple[str, tuple[int, ...]]:
    entry = checkpoint.entry(key)
    return entry.dtype, entry.shape


def _is_transposed(checkpoint: Checkpoint, key: str, layout: LoraModule, fan_in_fan_out: bool, names: Names) -> bool:
    """Whether the stored weight is (d_in × d_out)."""
    dtype, shape = _like(checkpoint, key)
    if dtype not in FLOATS:
        raise PimergeError(f"'{key}' is stored as {dtype}", f"expected {', '.join(FLOATS)}")
    stored = (shape[0] if shape else 0, math.prod(shape[1:]))
    plain, turned = (layout.d_out, layout.d_in), (layout.d_in, layout.d_out)
    if stored not in ((turned,) if layout.layer == "embedding" else (plain, turned)) or len(shape) < 2:
        raise PimergeError(
            f"module '{layout.name}': ΔW is {plain}, '{key}' is {shape}", "the adapter was trained on another base"
        )
    if layout.layer == "embedding" or plain != turned:
        return stored == turned
    if names.known:
        return is_fan_in_first(names, layout.name)
    return fan_in_fan_out


def _bias(checkpoint: Checkpoint, names: Names, module: str) -> str:
    try:
        return match(names, f"{module}.bias", f"the bias of module '{module}'")
    except PimergeError as error:
        raise PimergeError(
            f"module '{module}' has a bias update (lora_bias), but its layer in the checkpoint has no bias",
            "merge into an adapter instead, or train without lora_bias",
        ) from error


def _heads(
    checkpoint: Checkpoint, names: Names, head: Mapping[str, Tensor], updated: set[str], problems: Problems
) -> dict[str, str]:
    """Key → parameter name of each head tensor; a tensor that the checkpoint lacks is added under its own name."""
    found: dict[str, str] = {}
    for name in head:
        key = name
        with problems.collected():
            try:
                key = match(names, name, f"the head's '{name}'")
            except PimergeError:
                if name in names.known or name in names.converted:
                    raise
            if key in found or key in updated:
                problems.add(f"'{key}' would be replaced by the head and also changed by another part of the adapter")
            found[key] = name
    return found
