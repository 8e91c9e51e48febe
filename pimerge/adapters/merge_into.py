"""Merge a LoRA update into a full checkpoint: W' = W + s·B·A, in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pimerge.adapters.base_changes import PlannedChange, changed_pieces, plan_changes
from pimerge.adapters.into_config import fitted, separated
from pimerge.adapters.into_stacks import Placed, is_stacked, place_matrices, stacked_pieces
from pimerge.adapters.keys import is_saved, parameter_of
from pimerge.adapters.lora_module import Factors, LoraModule, times_added
from pimerge.adapters.stored_layout import bias_of, is_transposed, keys_as_stored
from pimerge.adapters.tensor_sets import BaseChange
from pimerge.checkpoints.checkpoint import Checkpoint, require_weights
from pimerge.checkpoints.dtypes import dtype_name
from pimerge.checkpoints.key_mapping import Names, match, match_modules, names_of
from pimerge.checkpoints.safetensors_file import PIECE
from pimerge.checkpoints.vocabularies import vocabulary_of
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
    modules_to_save: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
    trained_in: str | None = None,
    changes: Sequence[BaseChange] = (),
) -> MergeIntoPlan:
    """Check that an adapter fits a checkpoint; nothing is computed or written.

    Args:
        fan_in_fan_out: the field of the adapter's config; it decides how a square weight is stored where the model
            is unknown.
        head: parameter name → tensor that replaces the checkpoint's or is added.
        modules_to_save: the modules that the head's tensors belong to. PEFT loads any other tensor of the head into the
            base's own parameter, and so into all that are tied to it.
        fields: fields of ``config.json`` that the head needs, such as ``id2label``.
        trained_in: the class of the model that has the head, for a checkpoint whose own class has no place for it.
        changes: the changes of the base's parameters by experts without ΔW.
    """
    require_weights(checkpoint)
    stored = None if head or fan_in_fan_out or changes else keys_as_stored(checkpoint, layouts)
    if stored is not None:
        return MergeIntoPlan(checkpoint, stored, {}, {}, {}, frozenset(), False, None)
    names, problems = names_of(checkpoint), Problems()
    head, shared = head or {}, names.shared or {}
    weights = dict[str, str]()
    stacked = {name: layout for name, layout in layouts.items() if is_stacked(layout)}
    with problems.collected():
        plain = [name for name in layouts if name not in stacked]
        weights = {key: module for module, key in match_modules(names, plain).items()}
    stacks, turned = place_matrices(checkpoint, names, stacked, problems)
    changed = plan_changes(checkpoint, names, changes, fan_in_fan_out=fan_in_fan_out, problems=problems)
    heads = _heads(names, head, {*weights, *changed, *stacks}, problems)
    _refuse_both(weights.keys() & changed.keys(), problems)
    transposed, biases = set(turned), dict[str, str]()
    for key, module in weights.items():
        dtype, shape = _layout(checkpoint, shared.get(key, key), head.get(heads.get(key, "")))
        with problems.collected():
            if is_transposed(key, dtype, shape, layouts[module], fan_in_fan_out, names):
                transposed.add(key)
        with problems.collected():
            biases |= {bias_of(names, module): module} if layouts[module].bias is not None else {}
    by_rows = {key for key, change in changed.items() if change.rows and key not in shared}  # of all that are tied
    problems.raise_any(f"the adapter cannot be merged into '{checkpoint.path}'")
    touched = {*weights, *biases, *heads, *changed, *stacks} - by_rows
    touched -= _still_tied(touched, heads, head, shared, modules_to_save)
    heads = {key: name for key, name in heads.items() if key in touched or key in checkpoint.home}
    config = {**checkpoint.config, **(fields or {})}
    if trained_in and any(names.known and names.rename(key) not in names.known for key in heads):
        config["architectures"] = (fields or {}).get("architectures") or [trained_in]
    copies, config = separated(checkpoint, names, touched, config)
    if heads and not checkpoint.is_file:
        new = new_layouts(checkpoint, copies, heads, head)
        config = fitted(checkpoint, names, config, {key: shape for key, (_, shape) in new.items()})
    size, is_new = vocabulary_of(config), config != checkpoint.config and not checkpoint.is_file
    return MergeIntoPlan(
        checkpoint,
        weights,
        biases,
        heads,
        copies,
        frozenset(transposed),
        bool(copies),
        config if is_new else None,
        size if size != vocabulary_of(checkpoint.config) else None,
        changed,
        stacks,
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
        if key in plan.heads and key not in plan.weights and key not in plan.biases:
            return iter([heads[plan.heads[key]].reshape(-1)])
        if key in plan.changes:
            return changed_pieces(plan.checkpoint, plan.source(key), plan.changes[key], tensors or {})
        if key in plan.weights:
            return _weight(plan, key, _as_added(plan.weights[key], update), heads.get(plan.heads.get(key, "")))
        if key in plan.stacks:
            stack, is_turned = plan.stacks[key], key in plan.transposed
            return stacked_pieces(plan.checkpoint, plan.source(key), stack, update_of_matrix, transposed=is_turned)
        if key in plan.biases:
            start = heads[plan.heads[key]] if key in plan.heads else plan.checkpoint.read(plan.source(key))
            return iter([_plus_bias(start, update(plan.biases[key]))])
        if key in plan.copies:
            own = heads.get(_own_layer(plan.heads, plan.copies[key]))
            stored = plan.checkpoint.home[plan.copies[key]]
            return flat_pieces(stored, plan.copies[key]) if own is None else iter([own.reshape(-1)])
        return None

    new = new_layouts(plan.checkpoint, plan.copies, plan.heads, heads)
    size = write_like(plan.checkpoint, output, change, new=new, config=plan.config, dtype=dtype, track=track)
    matrices = {each.module for placed in plan.stacks.values() for each in placed}
    return MergedInto(len(plan.weights) + len(plan.changes) + len(matrices), plan.untied, size)


def _refuse_both(keys: set[str], problems: Problems) -> None:
    for key in sorted(keys):
        problems.add(f"'{key}' has trained rows and an update", "merge into an adapter instead (without --into)")


def _as_added(module: str, update: Callable[[str], Factors]) -> Factors:
    """The update of a module as often as PEFT adds it."""
    factors = update(module)
    return replace(factors, scaling=times_added(module) * factors.scaling)


def _weight(plan: MergeIntoPlan, key: str, factors: Factors, start: Tensor | None) -> Iterator[Tensor]:
    """W + s·B·A in blocks of rows of the stored weight, flattened; ``start`` replaces the stored W."""
    file = plan.checkpoint.home[source := plan.source(key)]
    kind = torch.float64 if file.entries[source].dtype == "F64" else torch.float32
    A, B = factors.A.cpu().to(kind), factors.B.cpu().to(kind)
    left, right = (A.T, B.T) if key in plan.transposed else (B, A)
    rows, columns = len(left), right.shape[1]
    step = max(1, PIECE // (16 * columns))  # a quarter of PIECE in float32, since several blocks are in memory at once
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        block = file.read_part(source, first * columns, stop * columns) if start is None else start[first:stop]
        yield torch.addmm(block.to(kind).view(-1, columns), left[first:stop], right, alpha=factors.scaling).view(-1)


def _plus_bias(bias: Tensor, factors: Factors) -> Tensor:
    """b + s·bias; a module whose merged update has no bias keeps b."""
    if factors.bias is None:
        return bias
    kind = torch.float64 if bias.dtype == torch.float64 else torch.float32
    return bias.to(kind) + factors.scaling * factors.bias.cpu().to(kind)


def _layout(checkpoint: Checkpoint, key: str, head: Tensor | None = None) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor, or of the head's that takes its place in the dtype of the checkpoint."""
    if key not in checkpoint.home:
        assert head is not None
        return dtype_name(head.dtype), tuple(head.shape)
    entry = checkpoint.entry(key)
    return entry.dtype, entry.shape if head is None else tuple(head.shape)


def new_layouts(
    checkpoint: Checkpoint, copies: Mapping[str, str], heads: Mapping[str, str], head: Mapping[str, Tensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key → dtype and shape, for the tensors that are added or replaced."""
    found = {key: _layout(checkpoint, of, head.get(_own_layer(heads, of))) for key, of in copies.items()}
    return found | {key: _layout(checkpoint, copies.get(key, key), head[name]) for key, name in heads.items()}


def _heads(names: Names, head: Mapping[str, Tensor], updated: set[str], problems: Problems) -> dict[str, str]:
    """Key → parameter name of each head tensor; a tensor that the checkpoint lacks is added under its own name.

    An adapted embedding that was saved as well is replaced first and then updated.
    """
    found: dict[str, str] = {}
    for name in head:
        key = parameter_of(name)
        with problems.collected():
            try:
                key = match(names, key, f"the head's '{key}'")
            except PimergeError:
                if key in names.known or key in names.converted:
                    raise
            if key in found or (key in updated and parameter_of(name) == name):
                problems.add(f"'{key}' would be replaced by the head and also changed by another part of the adapter")
            found[key] = name
    tied = names.shared or {}
    own = {tied[key]: name for key, name in found.items() if key in tied and parameter_of(name) != name}
    return own | found  # an adapted layer's own weight is also that of what is tied to it


def _own_layer(heads: Mapping[str, str], key: str) -> str:
    """The head's tensor that is the own weight of an adapted layer, which what was tied to it still has; or empty."""
    name = heads.get(key, "")
    return name if parameter_of(name) != name else ""


def _still_tied(
    touched: set[str],
    heads: Mapping[str, str],
    head: Mapping[str, Tensor],
    shared: Mapping[str, str],
    modules_to_save: Sequence[str],
) -> set[str]:
    """The keys of tied weights that the head replaces by equal tensors, or by one for all, so that they stay tied."""
    found = set()
    for stored in set(shared.values()) & heads.keys():
        name = heads[stored]
        sharing = {key for key, source in shared.items() if source == stored}
        equal = {key for key in sharing if key in heads and head[heads[key]].equal(head[name])}
        own = {heads[key] for key in (stored, *(sharing & touched & equal))}
        is_loaded = all(parameter_of(each) == each and not is_saved(each, modules_to_save) for each in own)
        if equal == sharing or (is_loaded and sharing & touched <= equal):
            found |= {stored, *sharing}
    return found
