"""The tensors of a merge that the claim does not cover: they must be the base's, or an expert's head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pimerge.adapters.head import rows_of
from pimerge.adapters.keys import TOKEN_ROWS, parameter_of
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.merging.verification.compared_tensor import F64, StoredTensor
from pimerge.merging.verification.rounding import precision_of, spacing
from pimerge.merging.verification.sources import Pairing, Source
from pimerge.merging.verification.verdict import CheckedModule, Verdict

_BLOCK = 2**21  # numbers of a tensor that are in memory at once


def judge_beside(
    pairing: Pairing, merged: Checkpoint, experts: Sequence[Source], weights: Sequence[float]
) -> tuple[list[CheckedModule], list[str]]:
    """The tensors that no expert changes but that differ from the base, and remarks on the others."""
    changed: list[CheckedModule] = []
    remarks: list[str] = []
    for key, (base, found) in pairing.untouched.items():
        if (size := _difference(base, found)) is None:
            continue
        owner = _owner_of_head(key, found, experts, weights)
        if owner:
            remarks.append(f"'{key}' is {owner}")
        elif _is_sum(key, base, found, experts, weights):
            remarks.append(f"'{key}' is the weighted sum of the values that the experts hold")
        else:
            reason = "" if math.isinf(size) else f"it differs from the base by {size:.2%}, though no expert changes it"
            changed.append(CheckedModule(key, Verdict.CHANGED if size == size else Verdict.NOT_FINITE, reason=reason))
    for key, reason in pairing.extra.items():
        owner = _owner_of_head(key, StoredTensor(merged.home[key], key), experts, weights)
        if owner:
            remarks.append(f"'{key}' is {owner}")
        elif key in pairing.resized and _is_sum(
            key, pairing.resized[key], StoredTensor(merged.home[key], key), experts, weights
        ):
            remarks.append(f"'{key}' is the weighted sum of the values that the experts hold, in the rows of the base")
        elif reason:
            changed.append(CheckedModule(key, Verdict.CHANGED, reason=reason))
        else:
            what = "not in the base" if owner is None else "the head of none of the experts"
            remarks.append(f"'{key}' is {what}, and not part of the claim")
    return changed, remarks


def is_other_base(pairing: Pairing, changed: Sequence[CheckedModule]) -> bool:
    """Whether most of the weights that no expert changes differ from the base's."""
    floats = {key for key, (base, _) in pairing.untouched.items() if base.file.entries[base.key].dtype in FLOATS}
    return len(floats & {each.name for each in changed}) > len(floats) / 2 > 0


def _difference(base: StoredTensor, found: StoredTensor) -> float | None:
    """‖found − base‖ / ‖base‖; None if they are equal up to rounding, infinite for other integers."""
    entry = base.file.entries[base.key]
    is_float = entry.dtype in FLOATS and found.file.entries[found.key].dtype in FLOATS
    differs, square, energy = False, 0.0, 0.0
    for before, after in _blocks(base, found, math.prod(entry.shape)):
        if not is_float:
            if not torch.equal(before, after):
                return math.inf
            continue
        dtype = precision_of(after)
        if not torch.equal(after, before.to(after.dtype)):
            error = (after.double() - before.double()).abs()
            is_narrower = torch.finfo(dtype).eps > torch.finfo(before.dtype).eps
            allowed = spacing(before, dtype) / 2 if is_narrower else torch.zeros((), dtype=F64)
            differs |= not bool((error <= allowed).all())
            square += float(error.square().sum())
        energy += float(before.double().square().sum())
    if not differs:
        return None
    return math.sqrt(square / energy) if energy else math.inf


def _blocks(base: StoredTensor, found: StoredTensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        yield base.file.read_part(base.key, start, stop), found.file.read_part(found.key, start, stop)


def _owner_of_head(key: str, found: StoredTensor, experts: Sequence[Source], weights: Sequence[float]) -> str | None:
    """Whose head a tensor is: a sentence; empty if it is nobody's, None if no expert has a head of that name."""
    heads: dict[str, Tensor] = {}
    for expert in experts:
        if isinstance(expert, Checkpoint):
            names = {name: name for name in expert.home}
            stored = {name: (expert.home[name], name) for name in names if _same_name(name, key)}
        else:
            stored = {name: (expert.file, own) for name, own in expert.head.items() if _same_name(name, key)}
        for file, own in stored.values():
            heads[expert.name] = file.read(own)
    if not heads:
        return None
    value = found.file.read(found.key)
    alike = {name: head for name, head in heads.items() if head.shape == value.shape}
    for name, head in alike.items():
        if torch.equal(head.to(value.dtype), value):
            return f"the head of '{name}'"
    if len(alike) == len(experts) and value.is_floating_point():
        shares = [*zip(weights, alike.values(), strict=True)]
        for pairs, what in (
            (shares, "the weighted mean of the heads"),
            ([(1 / len(alike), h) for _, h in shares], "the mean of the heads"),
        ):
            mean = torch.stack([w * head.double() for w, head in pairs]).sum(0)
            if bool(((mean - value.double()).abs() <= spacing(value, precision_of(value))).all()):
                return what
    return ""


def _is_sum(
    key: str, base: StoredTensor, found: StoredTensor, experts: Sequence[Source], weights: Sequence[float]
) -> bool:
    """Whether a tensor is φ0 + Σ w_n (φ_n − φ0) of the embeddings or rows of tokens that adapters hold.

    Only the tokens that all have are compared.
    """
    value, start = found.file.read(found.key), base.file.read(base.key).double()
    value, start = value[: len(start)], start[: len(value)]
    total, is_held = start.clone(), False
    for expert, weight in zip(experts, weights, strict=True):
        if isinstance(expert, Checkpoint):
            return False
        rows = rows_of(expert.head, expert.config.get("trainable_token_indices"))
        for name, own in expert.head.items():
            parameter = f"{name.removesuffix(TOKEN_ROWS)}.weight" if name in rows else parameter_of(name)
            if not _same_name(parameter, key):
                continue
            places = list(rows[name]) if name in rows else slice(None)
            held = expert.file.read(own).double()
            if name not in rows and held.shape[1:] == start.shape[1:]:
                value, start, total = value[: len(held)], start[: len(held)], total[: len(held)]
                held = held[: len(start)]
            if max(rows.get(name, ()), default=0) >= len(start) or start[places].shape != held.shape:
                return False
            total[places] += weight * (held - start[places])
            is_held = True
    return is_held and bool(((total - value.double()).abs() <= spacing(value, precision_of(value))).all())


def _same_name(one: str, other: str) -> bool:
    """Whether two parameter names are the same, with or without the backbone's prefix."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
